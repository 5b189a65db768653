// What fastclip/ calls through ctypes: exported C functions, out of which no exception may come.
#pragma once

#include <exception>
#include <string>

#define FASTCLIP_EXPORT extern "C" __attribute__((visibility("default")))

namespace fastclip {

// The text of what went wrong, until the next call on this thread; null where nothing did.
template <class Body>
const char* error_of(const Body& body) {
  static thread_local std::string error;
  try {
    body();
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}

}  // namespace fastclip
