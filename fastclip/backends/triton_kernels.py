"""The Triton kernels. Their table is made in triton_.py; their meaning is that of csrc/clip.h, whose names they share.

Tensors arrive in a table of int64 words, float64 numbers as their bits, so that no scalar is specialised or narrowed::

    list    slots, bits of p, bits of 1 / p, bits of max_norm
    launch  tensors, chunks, bits of p or of the lower bound, bits of the upper bound      one for each dtype
    row     chunks before it in its launch, address, elements, its first slot              one for each tensor
    place   its place in the list      one for each row, after them all, where a kernel has a number for each tensor

A chunk is CHUNK elements of one tensor and has one slot, in the order of the list, for its partial: results depend on
neither the grid nor the dtypes beside them. Inside a chunk the body starts at a multiple of 16 bytes and holds whole
vectors of 16 bytes; up to one vector of elements lies before it and one after it, the edges.
"""

# ruff: noqa: SIM102, SIM108, SIM300  (Triton's `and` takes both sides; a constexpr is no constant to be compared with)

import triton
import triton.language as tl

from . import triton_

_INTERPRETS = tl.constexpr(triton_._INTERPRETS)

# As NormKind in csrc/clip.h.
SQUARES = tl.constexpr(0)
ABS = tl.constexpr(1)
MAX = tl.constexpr(2)
MIN = tl.constexpr(3)
COUNT = tl.constexpr(4)
POW = tl.constexpr(5)

LIST_WORDS = tl.constexpr(4)
LAUNCH_WORDS = tl.constexpr(4)
ROW_WORDS = tl.constexpr(4)

_VECTOR_BYTES = tl.constexpr(16)
# What a float32 sum of squares must reach so that those below float32's range cannot matter: 65,536 errors of 2^-150
# are 2^-44 of it.
_LEAST_SUM_OF_SQUARES = tl.constexpr(2.0**-90)
_LEAST_NORMAL = tl.constexpr(2.0**-126)
_INFINITY = tl.constexpr(float("inf"))
_NAN = tl.constexpr(float("nan"))


@triton.jit
def _load_float(word):
    return tl.load(word).to(tl.float64, bitcast=True)


@triton.jit
def _find_number(launch, chunk):
    """The number of the last row with no more than `chunk` chunks before it."""
    low = tl.zeros([], tl.int64)
    high = tl.load(launch)
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(launch + 4 + middle * 4) <= chunk:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _find_row(launch, chunk):
    return launch + 4 + _find_number(launch, chunk) * 4


@triton.jit
def _open_chunk(row, chunk, STORAGE: tl.constexpr, CHUNK: tl.constexpr):
    """The body of a chunk, the number of its elements, and those of the edges before and after it."""
    SIZE: tl.constexpr = STORAGE.primitive_bitwidth // 8
    VECTOR: tl.constexpr = _VECTOR_BYTES // SIZE
    begin = (chunk - tl.load(row)) * CHUNK
    count = tl.minimum(tl.load(row + 2) - begin, CHUNK).to(tl.int32)
    address = tl.load(row + 1) + begin * SIZE
    head = tl.minimum(((-address & 15) // SIZE).to(tl.int32), count)
    vectors = (count - head) // VECTOR
    tail = count - head - vectors * VECTOR
    # A chunk that ends inside its head has no body, so the promise of alignment is never used.
    body = tl.multiple_of((address + head * SIZE).to(tl.pointer_type(STORAGE)), 16)
    return body, vectors * VECTOR, head, tail


@triton.jit
def _edges(count, head, tail, VECTOR: tl.constexpr):
    """Offsets from the body, and which of them exist: the first half before the body, the second after it."""
    lane = tl.arange(0, 2 * VECTOR)
    offset = tl.where(lane < VECTOR, lane - head, lane - VECTOR + count)
    return offset, tl.where(lane < VECTOR, lane < head, lane - VECTOR < tail)


@triton.jit
def _widen(x, DTYPE: tl.constexpr):
    """From storage to opmath. bfloat16 is the upper half of a float32."""
    if DTYPE == tl.bfloat16:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif DTYPE == tl.float16:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def _narrow(x, DTYPE: tl.constexpr):
    """From opmath to storage, to nearest even, which the interpreter's own cast to bfloat16 is not."""
    if DTYPE == tl.bfloat16 and not _INTERPRETS:
        return x.to(tl.bfloat16).to(tl.int16, bitcast=True)
    elif DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.int16)
    elif DTYPE == tl.float16:
        return x.to(tl.float16)
    else:
        return x


@triton.jit
def _float_bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _add_exactly(sum, error, x):
    """sum + error + x as such a pair again, without rounding `sum` away (Knuth's two-sum)."""
    total = sum + x
    part = total - sum
    return total, error + ((sum - (total - part)) + (x - part))


@triton.jit
def _add_term(sum, error, x, KIND: tl.constexpr, DTYPE: tl.constexpr):
    term = tl.abs(x)
    if KIND == 0:
        term = x * x
        if DTYPE == tl.float32:
            error += tl.fma(x, x, -term)  # squares of 16-bit floats are exact
    return _add_exactly(sum, error, term)


@triton.jit
def _load_four(place, BLOCK: tl.constexpr):
    return tl.load(place), tl.load(place + BLOCK), tl.load(place + 2 * BLOCK), tl.load(place + 3 * BLOCK)


# Loops that take four vectors load the next four before they use those: what a loop carries ptxas cannot load later to
# save registers, which leaves one load in flight.


@triton.jit
def _add_four(sum, error, seen, x0, x1, x2, x3, KIND: tl.constexpr, DTYPE: tl.constexpr):
    w0, w1, w2, w3 = _widen(x0, DTYPE), _widen(x1, DTYPE), _widen(x2, DTYPE), _widen(x3, DTYPE)
    sum, error = _add_term(sum, error, w0, KIND, DTYPE)
    sum, error = _add_term(sum, error, w1, KIND, DTYPE)
    sum, error = _add_term(sum, error, w2, KIND, DTYPE)
    sum, error = _add_term(sum, error, w3, KIND, DTYPE)
    if KIND == 0 and DTYPE != tl.float16:
        seen |= _float_bits(w0) | _float_bits(w1) | _float_bits(w2) | _float_bits(w3)
    return sum, error, seen


@triton.jit
def _sum_body_narrow(body, count, KIND: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of a body in pairs of float32, lane by lane, then over the lanes in float64; and the bits that it has."""
    lane = tl.arange(0, BLOCK)
    sum = tl.zeros([BLOCK], tl.float32)
    error = tl.zeros([BLOCK], tl.float32)
    seen = tl.zeros([BLOCK], tl.int32)
    unrolled = count // (4 * BLOCK) * (4 * BLOCK)
    if unrolled > 0:
        x0, x1, x2, x3 = _load_four(body + lane, BLOCK)
        for start in range(4 * BLOCK, unrolled, 4 * BLOCK):
            next0, next1, next2, next3 = _load_four(body + start + lane, BLOCK)
            sum, error, seen = _add_four(sum, error, seen, x0, x1, x2, x3, KIND, DTYPE)
            x0, x1, x2, x3 = next0, next1, next2, next3
        sum, error, seen = _add_four(sum, error, seen, x0, x1, x2, x3, KIND, DTYPE)
    for start in range(unrolled, count, BLOCK):
        x = _widen(tl.load(body + start + lane, mask=start + lane < count, other=0), DTYPE)
        sum, error = _add_term(sum, error, x, KIND, DTYPE)
        if KIND == 0 and DTYPE != tl.float16:
            seen |= _float_bits(x)
    return tl.sum(sum.to(tl.float64) + error.to(tl.float64)), seen


@triton.jit
def _wide_term(x, exists, p, unit, KIND: tl.constexpr):
    x = tl.abs(x.to(tl.float64))
    if KIND == 0:
        return x * x
    elif KIND == 1:
        return x
    else:
        # (|x| / unit)^p; log2(0) is -inf, as it has to be.
        return tl.where(exists, tl.exp2(p * tl.log2(x / unit)), 0.0)


@triton.jit
def _power_unit(extreme):
    """The unit in which powers are summed. Powers of 0, inf and NaN say by themselves what the norm is."""
    return tl.where((extreme > 0.0) & (extreme < _INFINITY), extreme, 1.0)


@triton.jit
def _root_in(unit, sum, p):
    return unit * tl.exp2(1.0 / p * tl.log2(sum))


@triton.jit
def _add_four_wide(sum, x0, x1, x2, x3, p, unit, KIND: tl.constexpr, DTYPE: tl.constexpr):
    sum += _wide_term(_widen(x0, DTYPE), True, p, unit, KIND)
    sum += _wide_term(_widen(x1, DTYPE), True, p, unit, KIND)
    sum += _wide_term(_widen(x2, DTYPE), True, p, unit, KIND)
    sum += _wide_term(_widen(x3, DTYPE), True, p, unit, KIND)
    return sum


@triton.jit
def _sum_body_wide(body, count, p, unit, KIND: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    sum = tl.zeros([BLOCK], tl.float64)
    unrolled = count // (4 * BLOCK) * (4 * BLOCK)
    if KIND == 5:
        unrolled = 0  # bound by its arithmetic
    if unrolled > 0:
        x0, x1, x2, x3 = _load_four(body + lane, BLOCK)
        for start in range(4 * BLOCK, unrolled, 4 * BLOCK):
            next0, next1, next2, next3 = _load_four(body + start + lane, BLOCK)
            sum = _add_four_wide(sum, x0, x1, x2, x3, p, unit, KIND, DTYPE)
            x0, x1, x2, x3 = next0, next1, next2, next3
        sum = _add_four_wide(sum, x0, x1, x2, x3, p, unit, KIND, DTYPE)
    for start in range(unrolled, count, BLOCK):
        exists = start + lane < count
        x = tl.load(body + start + lane, mask=exists, other=0)
        sum += _wide_term(_widen(x, DTYPE), exists, p, unit, KIND)
    return tl.sum(sum)


@triton.jit
def _magnitude(x, BITS: tl.constexpr):
    """|x| as an integer: it orders as |x| does, with NaN above inf, so that a maximum keeps NaN by construction."""
    if BITS == 16:
        return x.to(tl.int32) & 0x7FFF
    elif BITS == 32:
        return x & 0x7FFFFFFF
    else:
        return x & 0x7FFFFFFFFFFFFFFF


@triton.jit
def _magnitude_to_float(magnitude, DTYPE: tl.constexpr):
    if DTYPE == tl.bfloat16:
        return (magnitude << 16).to(tl.float32, bitcast=True).to(tl.float64)
    elif DTYPE == tl.float16:
        return magnitude.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float64)
    else:
        return magnitude.to(DTYPE, bitcast=True).to(tl.float64)


@triton.jit
def _extremes(body, count, head, tail, KIND: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest magnitude of a chunk, and the smallest where the minimum is asked for."""
    NONE: tl.constexpr = 0x7FFF if BITS == 16 else (0x7FFFFFFF if BITS == 32 else 0x7FFFFFFFFFFFFFFF)
    MAGNITUDE: tl.constexpr = tl.int64 if BITS == 64 else tl.int32
    lane = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], MAGNITUDE)
    smallest = tl.full([BLOCK], NONE, MAGNITUDE)
    unrolled = count // (4 * BLOCK) * (4 * BLOCK)
    for start in range(0, unrolled, 4 * BLOCK):
        x0 = _magnitude(tl.load(body + start + lane), BITS)
        x1 = _magnitude(tl.load(body + start + BLOCK + lane), BITS)
        x2 = _magnitude(tl.load(body + start + 2 * BLOCK + lane), BITS)
        x3 = _magnitude(tl.load(body + start + 3 * BLOCK + lane), BITS)
        largest = tl.maximum(largest, tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)))
        if KIND == 3:
            smallest = tl.minimum(smallest, tl.minimum(tl.minimum(x0, x1), tl.minimum(x2, x3)))
    for start in range(unrolled, count, BLOCK):
        exists = start + lane < count
        x = _magnitude(tl.load(body + start + lane, mask=exists, other=0), BITS)
        largest = tl.maximum(largest, x)
        if KIND == 3:
            smallest = tl.minimum(smallest, tl.where(exists, x, NONE))
    maximum = tl.max(largest)
    minimum = tl.min(smallest)
    if head + tail > 0:
        offset, exists = _edges(count, head, tail, _VECTOR_BYTES * 8 // BITS)
        x = _magnitude(tl.load(body + offset, mask=exists, other=0), BITS)
        maximum = tl.maximum(maximum, tl.max(x))
        if KIND == 3:
            minimum = tl.minimum(minimum, tl.min(tl.where(exists, x, NONE)))
    return maximum, minimum


@triton.jit
def norm_partial_kernel(
    launch,
    partials,
    KIND: tl.constexpr,
    NORMS: tl.constexpr,
    IN_UNIT: tl.constexpr,
    DTYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One partial for each chunk of a launch: sum of |x|^p, max |x|, min |x|, or 1 for a tensor with a non-zero.

    With NORMS, which is for POW, the norm of the chunk, whose powers are summed IN_UNIT of an extreme. A program for
    each chunk: the GPU balances them, however many its registers hold at once.
    """
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    INTEGER: tl.constexpr = tl.int16 if BITS == 16 else (tl.int32 if BITS == 32 else tl.int64)
    VECTOR: tl.constexpr = _VECTOR_BYTES * 8 // BITS
    p = _load_float(launch + 2)
    chunk = tl.program_id(0).to(tl.int64)
    row = _find_row(launch, chunk)
    slot = partials + tl.load(row + 3)
    if KIND == 2 or KIND == 3 or KIND == 4:
        body, count, head, tail = _open_chunk(row, chunk, INTEGER, CHUNK)
        maximum, minimum = _extremes(body, count, head, tail, KIND, BITS, BLOCK)
        if KIND == 4:
            # One slot for each tensor, zero before; all chunks that find something store the same 1.
            tl.store(slot, 1.0, mask=maximum != 0)
        else:
            partial = _magnitude_to_float(maximum, DTYPE)
            if KIND == 3:
                partial = tl.where(partial == partial, _magnitude_to_float(minimum, DTYPE), partial)
            tl.store(slot + (chunk - tl.load(row)), partial)
    else:
        unit = 1.0
        if IN_UNIT:
            body, count, head, tail = _open_chunk(row, chunk, INTEGER, CHUNK)
            maximum, minimum = _extremes(body, count, head, tail, 3, BITS, BLOCK)
            extreme = _magnitude_to_float(maximum, DTYPE)
            smallest = _magnitude_to_float(minimum, DTYPE)
            unit = _power_unit(tl.where((extreme == extreme) & (p < 0.0), smallest, extreme))
        STORAGE: tl.constexpr = tl.int16 if DTYPE == tl.bfloat16 else DTYPE
        body, count, head, tail = _open_chunk(row, chunk, STORAGE, CHUNK)
        if KIND == 5 or DTYPE == tl.float64:
            partial = _sum_body_wide(body, count, p, unit, KIND, DTYPE, BLOCK)
        else:
            partial, seen = _sum_body_narrow(body, count, KIND, DTYPE, BLOCK)
            if KIND == 0 and DTYPE != tl.float16:  # whose squares float32 holds
                if not (partial >= _LEAST_SUM_OF_SQUARES and partial < _INFINITY):
                    # Unless all are zeros, as in a layer that is frozen.
                    if not (partial == 0.0 and tl.max(seen & 0x7FFFFFFF) == 0):
                        partial = _sum_body_wide(body, count, p, unit, KIND, DTYPE, BLOCK)
            elif not (partial >= 0.0 and partial < _INFINITY):
                partial = _sum_body_wide(body, count, p, unit, KIND, DTYPE, BLOCK)
        if head + tail > 0:
            offset, exists = _edges(count, head, tail, VECTOR)
            x = tl.load(body + offset, mask=exists, other=0)
            partial += tl.sum(_wide_term(_widen(x, DTYPE), exists, p, unit, KIND))
        if NORMS:
            partial = _root_in(unit, partial, p)
        tl.store(slot + (chunk - tl.load(row)), partial)


@triton.jit
def tensor_norms_kernel(
    list_header,
    launch,
    partials,
    norms,
    KIND: tl.constexpr,
    NORMS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The norm of each tensor of a launch from its partials, which may be NORMS: a program for each."""
    p = _load_float(list_header + 1)
    tensors = tl.load(launch)
    row = launch + 4 + tl.program_id(0).to(tl.int64) * 4
    place = tl.load(launch + 4 + tensors * 4 + tl.program_id(0))
    first = partials + tl.load(row + 3)
    slots = tl.zeros([], tl.int64) + 1
    if KIND != 4:
        slots = (tl.load(row + 2) + CHUNK - 1) // CHUNK
    lane = tl.arange(0, BLOCK)
    sum = tl.zeros([BLOCK], tl.float64)
    largest = tl.zeros([BLOCK], tl.int64)
    smallest = tl.full([BLOCK], 0x7FFFFFFFFFFFFFFF, tl.int64)
    start = tl.zeros([], tl.int64)
    while start < slots:
        exists = start + lane < slots
        x = tl.load(first + start + lane, mask=exists, other=0.0)
        if KIND == 2 or KIND == 3 or NORMS:
            magnitude = _magnitude(x.to(tl.int64, bitcast=True), 64)
            largest = tl.maximum(largest, magnitude)
            smallest = tl.minimum(smallest, tl.where(exists, magnitude, 0x7FFFFFFFFFFFFFFF))
        else:
            sum += x
        start += BLOCK
    norm = tl.sum(sum)
    if KIND == 2 or KIND == 3 or NORMS:
        norm = tl.max(largest).to(tl.float64, bitcast=True)
        if KIND == 3 or NORMS:
            norm = tl.where((norm == norm) & (p < 0.0), tl.min(smallest).to(tl.float64, bitcast=True), norm)
    if NORMS:
        unit = _power_unit(norm)
        start = tl.zeros([], tl.int64)
        while start < slots:
            exists = start + lane < slots
            sum += _wide_term(tl.load(first + start + lane, mask=exists, other=0.0), exists, p, unit, KIND)
            start += BLOCK
        norm = _root_in(unit, tl.sum(sum), p)
    else:
        if KIND == 0:
            norm = tl.sqrt(norm)
        if KIND == 5:
            norm = tl.exp2(_load_float(list_header + 2) * tl.log2(norm))
    tl.store(norms + place, norm)


@triton.jit
def _store_norm(out, norm):
    """Rounds a norm once to the dtype of `out`: to odd on the way to 16 bits, so that the second rounding is exact."""
    if out.dtype.element_ty == tl.float64:
        tl.store(out, norm)
    else:
        nearest = norm.to(tl.float32)
        if out.dtype.element_ty == tl.float32:
            tl.store(out, nearest)
        else:
            bits = nearest.to(tl.int32, bitcast=True)
            inexact = (nearest.to(tl.float64) != norm) & (nearest == nearest) & (nearest < _INFINITY)
            step = tl.where(nearest.to(tl.float64) > norm, -1, 1)
            odd = tl.where(inexact & ((bits & 1) == 0), bits + step, bits).to(tl.float32, bitcast=True)
            if out.dtype.element_ty == tl.bfloat16:
                tl.store(out.to(tl.pointer_type(tl.int16), bitcast=True), _narrow(odd, tl.bfloat16))
            else:
                tl.store(out, odd.to(tl.float16))


@triton.jit
def norm_finalize_kernel(
    list_header,
    partials,
    out,
    clip_coef,
    found_inf,
    inv_scale,
    KIND: tl.constexpr,
    NORMS: tl.constexpr,
    ROOT: tl.constexpr,
    CLIP: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Combines the partials, which may be NORMS, in the order of their slots; then the ROOT.

    With CLIP what struct Clip in csrc/clip.h asks for: the norm times inv_scale, where that is no None, found_inf
    likewise, and the coefficient, which with ZERO is 0 where the norm is not finite.
    """
    p = _load_float(list_header + 1)
    slots = tl.load(list_header)
    lane = tl.arange(0, BLOCK)
    sum = tl.zeros([BLOCK], tl.float64)
    largest = tl.zeros([BLOCK], tl.int64)
    smallest = tl.full([BLOCK], 0x7FFFFFFFFFFFFFFF, tl.int64)
    start = tl.zeros([], tl.int64)
    while start < slots:
        exists = start + lane < slots
        x = tl.load(partials + start + lane, mask=exists, other=0.0)
        if KIND == 2 or KIND == 3 or NORMS:
            magnitude = _magnitude(x.to(tl.int64, bitcast=True), 64)
            largest = tl.maximum(largest, magnitude)
            smallest = tl.minimum(smallest, tl.where(exists, magnitude, 0x7FFFFFFFFFFFFFFF))
        else:
            sum += x
        start += BLOCK
    if KIND == 2 or KIND == 3 or NORMS:
        norm = tl.max(largest).to(tl.float64, bitcast=True)
        if KIND == 3 or NORMS:
            norm = tl.where((norm == norm) & (p < 0.0), tl.min(smallest).to(tl.float64, bitcast=True), norm)
    else:
        norm = tl.sum(sum)
    if NORMS:
        unit = _power_unit(norm)
        start = tl.zeros([], tl.int64)
        while start < slots:
            exists = start + lane < slots
            sum += _wide_term(tl.load(partials + start + lane, mask=exists, other=0.0), exists, p, unit, KIND)
            start += BLOCK
        norm = _root_in(unit, tl.sum(sum), p)
    elif ROOT:
        if KIND == 0:
            norm = tl.sqrt(norm)
        if KIND == 5:
            norm = tl.exp2(_load_float(list_header + 2) * tl.log2(norm))
    if CLIP:
        scale = tl.full([], 1.0, tl.float64)
        if inv_scale is not None:
            scale = tl.load(inv_scale).to(tl.float64)
            if KIND == 4:  # a count of tensors
                norm = tl.where(scale != 0.0, norm, 0.0)
            else:
                norm = norm * tl.abs(scale)
        is_finite = tl.abs(norm) < _INFINITY
        coef = _clip_coef(norm, _load_float(list_header + 3)) * scale
        if ZERO:
            coef = tl.where(is_finite, coef, 0.0)
        tl.store(clip_coef, coef)
        if found_inf is not None:
            tl.store(found_inf, tl.where(is_finite, 0.0, 1.0))
    _store_norm(out, norm)


@triton.jit
def _clip_coef(norm, max_norm):
    """In torch's order: reciprocal, then product; the comparison lets a NaN stay, and no norm reaches inf."""
    coef = 1.0 / (norm + 1e-6) * max_norm
    return tl.where((coef > 1.0) | (max_norm == _INFINITY), 1.0, coef)


@triton.jit
def coef_kernel(list_header, norm, clip_coef):
    """The coefficient from a norm of any dtype."""
    tl.store(clip_coef, _clip_coef(tl.load(norm).to(tl.float64), _load_float(list_header + 3)))


@triton.jit
def _scale_block(x, coef, ZERO: tl.constexpr, DTYPE: tl.constexpr):
    """In the dtype of the coefficient, and from float64 to 16 bits by way of float32."""
    scaled = _narrow((_widen(x, DTYPE) * coef).to(tl.float64 if DTYPE == tl.float64 else tl.float32), DTYPE)
    if ZERO:
        scaled = tl.where(coef == 0.0, tl.zeros_like(scaled), scaled)
    return scaled


@triton.jit
def _scale_four(place, x0, x1, x2, x3, coef, ZERO: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(place, _scale_block(x0, coef, ZERO, DTYPE))
    tl.store(place + BLOCK, _scale_block(x1, coef, ZERO, DTYPE))
    tl.store(place + 2 * BLOCK, _scale_block(x2, coef, ZERO, DTYPE))
    tl.store(place + 3 * BLOCK, _scale_block(x3, coef, ZERO, DTYPE))


@triton.jit
def _scale_chunk(row, chunk, wide, DTYPE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """x *= wide for a chunk, in the dtype of its arithmetic or, below float32, in float64."""
    STORAGE: tl.constexpr = tl.int16 if DTYPE == tl.bfloat16 else DTYPE
    OPMATH: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    below = (wide != 0.0) & (tl.abs(wide) < _LEAST_NORMAL) & (DTYPE != tl.float64)
    coef = wide.to(OPMATH)
    lane = tl.arange(0, BLOCK)
    if below | (coef != 1.0):
        body, count, head, tail = _open_chunk(row, chunk, STORAGE, CHUNK)
        for start in range(-head, count + tail, BLOCK):
            exists = start + lane < count + tail
            place = body + start + lane
            x = tl.load(place, mask=exists)
            if below:
                tl.store(place, _scale_block(x, wide, False, DTYPE), mask=exists)
            else:
                tl.store(place, _scale_block(x, coef, False, DTYPE), mask=exists)


@triton.jit
def scale_each_kernel(launch, coefs, DTYPE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """x *= coefs[place of its tensor in the list]; writes nothing where that is 1."""
    chunks = tl.load(launch + 1)
    places = launch + 4 + tl.load(launch) * 4
    chunk = chunks - 1 - tl.program_id(0)
    while chunk >= 0:
        number = _find_number(launch, chunk)
        place = tl.load(places + number)
        _scale_chunk(launch + 4 + number * 4, chunk, tl.load(coefs + place), DTYPE, CHUNK, BLOCK)
        chunk -= tl.num_programs(0)


@triton.jit
def _scale_wide(launch, coef, DTYPE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """x *= coef in float64, for a coefficient below float32."""
    STORAGE: tl.constexpr = tl.int16 if DTYPE == tl.bfloat16 else DTYPE
    lane = tl.arange(0, BLOCK)
    chunk = tl.program_id(0).to(tl.int64)
    while chunk < tl.load(launch + 1):
        row = _find_row(launch, chunk)
        body, count, head, tail = _open_chunk(row, chunk, STORAGE, CHUNK)
        for start in range(-head, count + tail, BLOCK):
            exists = start + lane < count + tail
            place = body + start + lane
            tl.store(place, _scale_block(tl.load(place, mask=exists), coef, False, DTYPE), mask=exists)
        chunk += tl.num_programs(0)


@triton.jit
def scale_kernel(launch, clip_coef, ZERO: tl.constexpr, DTYPE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """x *= clip_coef; writes nothing where it is 1 in the dtype of the arithmetic.

    With ZERO a coefficient of 0 makes zeros also of inf and NaN.
    """
    STORAGE: tl.constexpr = tl.int16 if DTYPE == tl.bfloat16 else DTYPE
    OPMATH: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    VECTOR: tl.constexpr = _VECTOR_BYTES * 8 // DTYPE.primitive_bitwidth
    wide = tl.load(clip_coef).to(tl.float64)
    coef = wide.to(OPMATH)
    if (wide != 0.0) & (tl.abs(wide) < _LEAST_NORMAL) & (DTYPE != tl.float64):
        _scale_wide(launch, wide, DTYPE, CHUNK, BLOCK)
    elif coef != 1.0:
        chunks = tl.load(launch + 1)
        lane = tl.arange(0, BLOCK)
        # Backwards: what the norm read last is still in cache.
        chunk = chunks - 1 - tl.program_id(0)
        while chunk >= 0:
            row = _find_row(launch, chunk)
            body, count, head, tail = _open_chunk(row, chunk, STORAGE, CHUNK)
            unrolled = count // (4 * BLOCK) * (4 * BLOCK)
            if unrolled > 0:
                place = body + lane
                x0, x1, x2, x3 = _load_four(place, BLOCK)
                for _ in range(4 * BLOCK, unrolled, 4 * BLOCK):
                    next0, next1, next2, next3 = _load_four(place + 4 * BLOCK, BLOCK)
                    _scale_four(place, x0, x1, x2, x3, coef, ZERO, DTYPE, BLOCK)
                    x0, x1, x2, x3 = next0, next1, next2, next3
                    place += 4 * BLOCK
                _scale_four(place, x0, x1, x2, x3, coef, ZERO, DTYPE, BLOCK)
            for start in range(unrolled, count, BLOCK):
                exists = start + lane < count
                x = tl.load(body + start + lane, mask=exists)
                tl.store(body + start + lane, _scale_block(x, coef, ZERO, DTYPE), mask=exists)
            if head + tail > 0:
                offset, exists = _edges(count, head, tail, VECTOR)
                x = tl.load(body + offset, mask=exists)
                tl.store(body + offset, _scale_block(x, coef, ZERO, DTYPE), mask=exists)
            chunk -= tl.num_programs(0)


@triton.jit
def sanitize_kernel(launch, DTYPE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """x = 0 where x is not finite; writes only those."""
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    INTEGER: tl.constexpr = tl.int16 if BITS == 16 else (tl.int32 if BITS == 32 else tl.int64)
    lane = tl.arange(0, BLOCK)
    chunk = tl.program_id(0).to(tl.int64)
    while chunk < tl.load(launch + 1):
        row = _find_row(launch, chunk)
        body, count, head, tail = _open_chunk(row, chunk, INTEGER, CHUNK)
        for start in range(-head, count + tail, BLOCK):
            exists = start + lane < count + tail
            place = body + start + lane
            bits = tl.load(place, mask=exists, other=0)
            x = _magnitude_to_float(_magnitude(bits, BITS), DTYPE)
            tl.store(place, tl.zeros_like(bits), mask=exists & ~(x < _INFINITY))
        chunk += tl.num_programs(0)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _clamp_element(bits, low, high, DTYPE: tl.constexpr):
    """The bits of elements, clamped to bounds in opmath that their dtype holds. A NaN compares false and stays."""
    low_bits = _narrow(low, DTYPE).to(bits.dtype, bitcast=True)
    high_bits = _narrow(high, DTYPE).to(bits.dtype, bitcast=True)
    if DTYPE == tl.bfloat16 and _INTERPRETS:
        x = _widen(bits, DTYPE)
    else:
        # Compared in 16 bits, two at once where the GPU can.
        x = bits.to(DTYPE, bitcast=True)
        low = low.to(DTYPE)
        high = high.to(DTYPE)
    return tl.where(x > high, high_bits, tl.where(x < low, low_bits, bits))


@triton.jit
def _clamp_word(word, low, high, DTYPE: tl.constexpr):
    if DTYPE.primitive_bitwidth == 16:
        first = _clamp_element(word.to(tl.int16), low, high, DTYPE)
        second = _clamp_element((word >> 16).to(tl.int16), low, high, DTYPE)
        return (second.to(tl.int32) << 16) | (first.to(tl.int32) & 0xFFFF)
    else:
        return _clamp_element(word, low, high, DTYPE)


@triton.jit
def _clamp_vectors(place, words, exists, low, high, DTYPE: tl.constexpr):
    """Stores the vectors, along the last dimension, in which clamping changes something."""
    clamped = _clamp_word(words, low, high, DTYPE)
    differs = words ^ clamped
    if DTYPE == tl.float64:  # of which an xor makes ptxas spill
        x = words.to(tl.float64, bitcast=True)
        differs = ((x < low) | (x > high)).to(tl.int64)
    changed = tl.reduce(differs, 1, _or, keep_dims=True) != 0
    tl.store(place, clamped, mask=exists & changed)


@triton.jit
def _clamp_four(place, x0, x1, x2, x3, low, high, DTYPE: tl.constexpr, STEP: tl.constexpr):
    _clamp_vectors(place, x0, True, low, high, DTYPE)
    _clamp_vectors(place + STEP, x1, True, low, high, DTYPE)
    _clamp_vectors(place + 2 * STEP, x2, True, low, high, DTYPE)
    _clamp_vectors(place + 3 * STEP, x3, True, low, high, DTYPE)


@triton.jit
def clamp_kernel(launch, DTYPE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """x = min(max(x, low), high), which keeps NaN; writes only the vectors of 16 bytes that change."""
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    INTEGER: tl.constexpr = tl.int16 if BITS == 16 else (tl.int32 if BITS == 32 else tl.int64)
    OPMATH: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    WORD: tl.constexpr = tl.int64 if BITS == 64 else tl.int32
    PACKED: tl.constexpr = 2 if BITS == 16 else 1
    WORDS: tl.constexpr = 2 if BITS == 64 else 4
    STEP: tl.constexpr = BLOCK // PACKED  # words
    chunks = tl.load(launch + 1)
    # Where they cross, the upper bound is what remains; each element is then compared with both as it is.
    low = _load_float(launch + 2).to(OPMATH)
    high = _load_float(launch + 3).to(OPMATH)
    low = tl.where(low > high, high, low)
    vector = tl.arange(0, STEP // WORDS)[:, None] * WORDS
    lane = vector + tl.arange(0, WORDS)[None, :]
    chunk = tl.program_id(0).to(tl.int64)
    while chunk < chunks:
        row = _find_row(launch, chunk)
        body, count, head, tail = _open_chunk(row, chunk, INTEGER, CHUNK)
        words = tl.multiple_of(body.to(tl.pointer_type(WORD), bitcast=True), 16)
        length = count // PACKED
        unrolled = length // (4 * STEP) * (4 * STEP)
        if unrolled > 0:
            place = words + lane
            x0, x1, x2, x3 = _load_four(place, STEP)
            for _ in range(4 * STEP, unrolled, 4 * STEP):
                next0, next1, next2, next3 = _load_four(place + 4 * STEP, STEP)
                _clamp_four(place, x0, x1, x2, x3, low, high, DTYPE, STEP)
                x0, x1, x2, x3 = next0, next1, next2, next3
                place += 4 * STEP
            _clamp_four(place, x0, x1, x2, x3, low, high, DTYPE, STEP)
        for start in range(unrolled, length, STEP):
            x = tl.load(words + start + lane, mask=start + lane < length, other=0)
            _clamp_vectors(words + start + lane, x, start + vector < length, low, high, DTYPE)
        if head + tail > 0:
            offset, exists = _edges(count, head, tail, PACKED * WORDS)
            x = tl.load(body + offset, mask=exists, other=0)
            clamped = _clamp_element(x, low, high, DTYPE)
            tl.store(body + offset, clamped, mask=exists & (clamped != x))
        chunk += tl.num_programs(0)


@triton.jit
def _look(bits, exists, sum, largest, nonfinite, zeros, DTYPE: tl.constexpr, BITS: tl.constexpr):
    """Adds a block of numbers, as integers, to what is known of the chunk."""
    INFINITY: tl.constexpr = (
        0x7FF0000000000000
        if BITS == 64
        else (0x7F800000 if BITS == 32 else (0x7F80 if DTYPE == tl.bfloat16 else 0x7C00))
    )
    magnitude = _magnitude(bits, BITS)
    x = _widen(bits if DTYPE == tl.bfloat16 else bits.to(DTYPE, bitcast=True), DTYPE)
    sum += _wide_term(x, exists, 2.0, 1.0, 0)
    largest = tl.maximum(largest, magnitude)
    nonfinite += (magnitude >= INFINITY).to(tl.int32)
    zeros += (exists & (magnitude == 0)).to(tl.int32)
    return sum, largest, nonfinite, zeros


@triton.jit
def stats_partial_kernel(launch, partials, DTYPE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Four numbers for each chunk of a launch: sum of |x|^2, max |x|, how many are not finite, how many are 0."""
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    INTEGER: tl.constexpr = tl.int16 if BITS == 16 else (tl.int32 if BITS == 32 else tl.int64)
    MAGNITUDE: tl.constexpr = tl.int64 if BITS == 64 else tl.int32
    VECTOR: tl.constexpr = _VECTOR_BYTES * 8 // BITS
    chunks = tl.load(launch + 1)
    lane = tl.arange(0, BLOCK)
    chunk = tl.program_id(0).to(tl.int64)
    while chunk < chunks:
        row = _find_row(launch, chunk)
        body, count, head, tail = _open_chunk(row, chunk, INTEGER, CHUNK)
        sum = tl.zeros([BLOCK], tl.float64)
        largest = tl.zeros([BLOCK], MAGNITUDE)
        nonfinite = tl.zeros([BLOCK], tl.int32)
        zeros = tl.zeros([BLOCK], tl.int32)
        for start in range(0, count, BLOCK):
            exists = start + lane < count
            bits = tl.load(body + start + lane, mask=exists, other=0)
            sum, largest, nonfinite, zeros = _look(bits, exists, sum, largest, nonfinite, zeros, DTYPE, BITS)
        offset, exists = _edges(count, head, tail, VECTOR)
        edge = tl.zeros([2 * VECTOR], tl.int32)
        edges, most, odd, none = _look(
            tl.load(body + offset, mask=exists, other=0),
            exists,
            edge.to(tl.float64),
            edge.to(MAGNITUDE),
            edge,
            edge,
            DTYPE,
            BITS,
        )
        slot = partials + 4 * (tl.load(row + 3) + (chunk - tl.load(row)))
        tl.store(slot, tl.sum(sum) + tl.sum(edges))
        tl.store(slot + 1, _magnitude_to_float(tl.maximum(tl.max(largest), tl.max(most)), DTYPE))
        tl.store(slot + 2, (tl.sum(nonfinite) + tl.sum(odd)).to(tl.float64))
        tl.store(slot + 3, (tl.sum(zeros) + tl.sum(none)).to(tl.float64))
        chunk += tl.num_programs(0)


@triton.jit
def stats_finish_kernel(launch, partials, table, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """The numbers of each tensor of a launch from those of its chunks: a program for each."""
    tensors = tl.load(launch)
    row = launch + 4 + tl.program_id(0).to(tl.int64) * 4
    place = tl.load(launch + 4 + tensors * 4 + tl.program_id(0))
    first = partials + 4 * tl.load(row + 3)
    slots = (tl.load(row + 2) + CHUNK - 1) // CHUNK
    lane = tl.arange(0, BLOCK)
    sum = tl.zeros([BLOCK], tl.float64)
    largest = tl.zeros([BLOCK], tl.int64)
    nonfinite = tl.zeros([BLOCK], tl.float64)
    zeros = tl.zeros([BLOCK], tl.float64)
    start = tl.zeros([], tl.int64)
    while start < slots:
        exists = start + lane < slots
        one = first + 4 * (start + lane)
        sum += tl.load(one, mask=exists, other=0.0)
        magnitude = _magnitude(tl.load(one + 1, mask=exists, other=0.0).to(tl.int64, bitcast=True), 64)
        largest = tl.maximum(largest, magnitude)
        nonfinite += tl.load(one + 2, mask=exists, other=0.0)
        zeros += tl.load(one + 3, mask=exists, other=0.0)
        start += BLOCK
    out = table + 4 * place
    tl.store(out, tl.sum(sum))
    tl.store(out + 1, tl.max(largest).to(tl.float64, bitcast=True))
    tl.store(out + 2, tl.sum(nonfinite))
    tl.store(out + 3, tl.sum(zeros))
