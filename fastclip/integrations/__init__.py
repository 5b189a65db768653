"""What other libraries are given: a module for each, which imports that library."""
