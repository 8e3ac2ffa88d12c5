/* The kernels of quant/kernels/eager.py for CPUs, each a single pass over memory; quant/kernels/native.py compiles and
   calls them.

   Tensors are (outer, groups, inner), and the elements of a group share a scale. All arithmetic is float32, without
   contraction to fused multiply-adds, so that values and input gradients are bit-identical to the eager kernels. Sums
   are split at fixed positions and added in a fixed order, so that they do not depend on the number of threads. */

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#define INLINE static inline __attribute__((always_inline))

namespace {

constexpr int64_t CHUNK = 16384; // elements per task; they fit into the L1 and L2 caches of a core

INLINE int32_t bits(float f) { int32_t i; std::memcpy(&i, &f, 4); return i; }
INLINE float from_bits(int32_t i) { float f; std::memcpy(&f, &i, 4); return f; }

struct Bfloat16 { uint16_t pattern; };

INLINE float load(float v) { return v; }
INLINE float load(Bfloat16 v) { return from_bits(int32_t(uint32_t(v.pattern) << 16)); }
INLINE void store(float &to, float v) { to = v; }
INLINE void store(Bfloat16 &to, float v) {
    uint32_t b = uint32_t(bits(v));
    to.pattern = v != v ? 0x7FC0 : uint16_t((b + 0x7FFF + ((b >> 16) & 1)) >> 16);
}
#ifdef __FLT16_MAX__
INLINE float load(_Float16 v) { return float(v); }
INLINE void store(_Float16 &to, float v) { to = _Float16(v); }
#endif

/* Rounding parameters: the five numbers of a group are `stride` apart, those of neighbouring groups `step`, which is 0
   if all groups share them. */
struct Params {
    const float *numbers;
    int64_t stride, step;
};

struct Scales {
    const float *values;
    float least; // lower bound applied to the scales; -inf disables it
};

INLINE float at_least(float scale, float least) { return scale < least ? least : scale; }

/* `eager.round_to_grid`. The division by a power of two is a multiplication by its inverse, whose exponent takes one
   subtraction; only the inverse of 2^127 is subnormal. The comparisons are such that NaN stays NaN. */
INLINE float round_to(float v, float low, float high, float smallest_power, float magic, float keep_sign) {
    float y = v < low ? low : v;
    y = y > high ? high : y;
    int32_t power = bits(y) & 0x7F800000;
    power = power > bits(smallest_power) ? power : bits(smallest_power);
    int32_t inverse = 0x7F000000 - power;
    inverse = inverse > 0x00400000 ? inverse : 0x00400000;
    const float r = ((y * from_bits(inverse) + magic) - magic) * from_bits(power);
    const int32_t sign = keep_sign > 0 ? INT32_MIN : 0;
    return from_bits((bits(r) & ~sign) | (bits(v) & sign));
}

/* Rounds contiguous elements. own_scales, own_grids: whether element i uses the scale or parameters of group + i; else
   all use those of `group`. Parameters are copied to scalars because compilers vectorize the loop only then: a struct
   or a branch in it costs a factor of ten. */
template <bool own_scales, bool own_grids, typename T>
INLINE void round_run(const T *x, T *out, int64_t size, Scales scales, Params params, int64_t group) {
    const float *scale = scales.values + group;
    const float least = scales.least;
    const float *lows = params.numbers + group * params.step, *highs = lows + params.stride;
    const float *powers = highs + params.stride, *magics = powers + params.stride, *signs = magics + params.stride;
    const float low = *lows, high = *highs, power = *powers, magic = *magics, sign = *signs;
    const float one_scale = at_least(*scale, least);
#pragma omp simd
    for (int64_t i = 0; i < size; i++) {
        const float s = own_scales ? at_least(scale[i], least) : one_scale;
        const float r = own_grids ? round_to(load(x[i]) / s, lows[i], highs[i], powers[i], magics[i], signs[i])
                                  : round_to(load(x[i]) / s, low, high, power, magic, sign);
        store(out[i], r * s);
    }
}

/* Computes gradients for contiguous elements: dx straight-through (may alias `grad`); if `learned`, the scale's (LSQ),
   summed in sums[0] or, with own_scales, in sums[i]; if `again`, the rounded values as well. */
template <bool own_scales, bool own_grids, bool learned, bool again, typename T>
INLINE void gradient_run(const T *grad, const T *x, T *dx, T *out, int64_t size, Scales scales, Params params,
                         int64_t group, float *sums) {
    const float *scale = scales.values + group;
    const float least = scales.least;
    const float *lows = params.numbers + group * params.step, *highs = lows + params.stride;
    const float *powers = highs + params.stride, *magics = powers + params.stride, *signs = magics + params.stride;
    const float low = *lows, high = *highs, power = *powers, magic = *magics, sign = *signs;
    const float one_scale = at_least(*scale, least);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) {
        const float s = own_scales ? at_least(scale[i], least) : one_scale, v = load(x[i]) / s, g = load(grad[i]);
        const bool inside = own_grids ? (v >= lows[i]) & (v <= highs[i]) : (v >= low) & (v <= high);
        if constexpr (learned || again) {
            const float r = own_grids ? round_to(v, lows[i], highs[i], powers[i], magics[i], signs[i])
                                      : round_to(v, low, high, power, magic, sign);
            const float part = g * (inside ? r - v : r);
            if constexpr (learned && own_scales) sums[i] += part;
            if constexpr (learned && !own_scales) sum += part;
            if constexpr (again) store(out[i], r * s);
        }
        store(dx[i], inside ? g : 0.0f);
    }
    if constexpr (learned && !own_scales) *sums = sum;
}

/* A tensor as runs of elements that share a scale, `inner` long. Rows are `length` long; the last run of a row may be
   shorter (groups along the reduction axis). Otherwise a row is one run, length = inner. inner = 1: neighbouring elements
   have different scales. */
struct Runs {
    int64_t outer, groups, inner, length;

    int64_t in_row() const { return (length + inner - 1) / inner; }
    int64_t count() const { return outer * groups; }
    int64_t elements() const { return count() / in_row() * length; }
    bool short_and_equal() const { return inner > 1 && inner <= CHUNK && length % inner == 0; }
    int64_t start(int64_t run) const { return run / in_row() * length + run % in_row() * inner; }
    int64_t size(int64_t run) const {
        const int64_t left = length - run % in_row() * inner;
        return left < inner ? left : inner;
    }
};

/* Calls work(offset, size, group) for runs of elements that share a scale, or of which each has its own; runs are split
   at the ends of tasks. Returns the bitwise or of the results. */
template <typename Work> INLINE int32_t for_runs(Runs runs, int threads, Work work) {
    const int64_t size = runs.elements(), tasks = (size + CHUNK - 1) / CHUNK, in_row = runs.in_row();
    int32_t result = 0;
#pragma omp parallel for num_threads(threads) if (tasks > 1) reduction(| : result)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t end = task + 1 < tasks ? (task + 1) * CHUNK : size;
        int64_t a = task * CHUNK;
        if (runs.inner == 1) {
            for (int64_t b; a < end; a = b) {
                b = (a / runs.groups + 1) * runs.groups < end ? (a / runs.groups + 1) * runs.groups : end;
                result |= work(a, b - a, a % runs.groups);
            }
            continue;
        }
        // Runs may be as short as 8 elements: no division within the loop.
        int64_t place = a / runs.length * in_row + a % runs.length / runs.inner;
        int64_t row_end = (a / runs.length + 1) * runs.length, b = runs.start(place);
        for (; a < end; a = b, place++) {
            if (a == row_end) row_end += runs.length;
            b = b + runs.inner < row_end ? b + runs.inner : row_end;
            const int64_t stop = b < end ? b : end;
            result |= work(a, stop - a, place < runs.groups ? place : place % runs.groups);
        }
    }
    return result;
}

/* Calls work(run, offset, size, group) for runs that are `short_and_equal`. The compiler knows the size of the usual
   groups, and then unrolls the loops over them. No division within the loop: it takes as long as a short run. */
template <typename Work> INLINE void for_equal_runs(Runs runs, int threads, Work work) {
    auto call = [&](auto size) {
        const int64_t count = runs.count(), together = CHUNK / size;
#pragma omp parallel for num_threads(threads) if (count > together)
        for (int64_t first = 0; first < count; first += together)
            for (int64_t k = first, group = first % runs.groups; k < first + together && k < count; k++) {
                work(k, k * size, size, group);
                group = group + 1 < runs.groups ? group + 1 : 0;
            }
    };
    if (runs.inner == 32) call(std::integral_constant<int64_t, 32>());
    else if (runs.inner == 64) call(std::integral_constant<int64_t, 64>());
    else if (runs.inner == 128) call(std::integral_constant<int64_t, 128>());
    else call(runs.inner);
}

template <typename T>
void round_all(const T *x, T *out, Scales scales, Params params, Runs runs, int threads) {
    if (runs.short_and_equal()) {
        for_equal_runs(runs, threads, [&](int64_t, int64_t a, auto size, int64_t group) __attribute__((always_inline)) {
            round_run<false, false>(x + a, out + a, size, scales, params, group);
        });
        return;
    }
    for_runs(runs, threads, [&](int64_t a, int64_t size, int64_t group) {
        if (runs.inner > 1) round_run<false, false>(x + a, out + a, size, scales, params, group);
        else if (params.step) round_run<true, true>(x + a, out + a, size, scales, params, group);
        else round_run<true, false>(x + a, out + a, size, scales, params, group);
        return 0;
    });
}

/* Rounds contiguous elements to codes: value = scale * step * (code - shift), with codes_of_one = 1 / step, all exact.
   Returns whether there was a NaN, which has no code. */
template <bool own_scales, typename T>
INLINE int32_t codes_run(const T *x, uint8_t *out, int64_t size, Scales scales, const float *params, int64_t group,
                         float codes_of_one, float shift) {
    const float *scale = scales.values + group;
    const float least = scales.least, one_scale = at_least(*scale, least);
    const float low = params[0], high = params[1], power = params[2], magic = params[3], sign = params[4];
    int32_t missing = 0;
#pragma omp simd reduction(| : missing)
    for (int64_t i = 0; i < size; i++) {
        const float s = own_scales ? at_least(scale[i], least) : one_scale, v = load(x[i]) / s;
        out[i] = uint8_t(int32_t(round_to(v, low, high, power, magic, sign) * codes_of_one + shift));
        missing |= v != v;
    }
    return missing;
}

template <typename T>
int codes_all(const T *x, uint8_t *out, Scales scales, const float *params, float codes_of_one, float shift,
              int64_t outer, int64_t groups, int64_t inner, int threads) {
    return for_runs({outer, groups, inner, inner}, threads, [&](int64_t a, int64_t size, int64_t group) {
        return inner > 1 ? codes_run<false>(x + a, out + a, size, scales, params, group, codes_of_one, shift)
                         : codes_run<true>(x + a, out + a, size, scales, params, group, codes_of_one, shift);
    });
}

/* Gradients if each run of `inner` elements shares a scale. A task is a piece of a run, or several short runs. */
template <bool learned, bool again, typename T>
void gradients_of_runs(const T *grad, const T *x, T *dx, T *out, Scales scales, Params params, Runs runs, float *dscale,
                       int threads) {
    if (runs.short_and_equal() && runs.outer == 1) {
        for_equal_runs(runs, threads, [&](int64_t k, int64_t a, auto size, int64_t group) __attribute__((always_inline)) {
            gradient_run<false, false, learned, again>(grad + a, x + a, dx + a, again ? out + a : out, size, scales,
                                                       params, group, learned ? dscale + k : nullptr);
        });
        return;
    }
    const int64_t pieces = (runs.inner + CHUNK - 1) / CHUNK, tasks = runs.count() * pieces;
    const int64_t together = runs.inner < CHUNK ? CHUNK / runs.inner : 1;
    std::vector<float> sums(learned ? tasks : 0);
#pragma omp parallel for num_threads(threads) if (runs.elements() > CHUNK)
    for (int64_t first = 0; first < tasks; first += together) {
        for (int64_t k = first; k < first + together && k < tasks; k++) {
            const int64_t run = pieces == 1 ? k : k / pieces, skipped = (k - run * pieces) * CHUNK;
            const int64_t a = runs.start(run) + skipped, left = runs.size(run) - skipped;
            if (left <= 0) continue;
            gradient_run<false, false, learned, again>(grad + a, x + a, dx + a, again ? out + a : out,
                                                       left < CHUNK ? left : CHUNK, scales, params, run % runs.groups,
                                                       learned ? &sums[k] : nullptr);
        }
    }
    if constexpr (learned) {
        std::vector<double> totals(runs.groups);
        for (int64_t k = 0; k < tasks; k++) totals[k / pieces % runs.groups] += sums[k];
        for (int64_t g = 0; g < runs.groups; g++) dscale[g] = float(totals[g]);
    }
}

/* Gradients if neighbouring elements have different scales. Tasks are a fixed number of slices of the outer axis. */
template <bool learned, bool again, typename T>
void gradients_of_columns(const T *grad, const T *x, T *dx, T *out, Scales scales, Params params, int64_t outer,
                          int64_t groups, float *dscale, int threads) {
    const int64_t slices = outer < 16 ? outer : 16;
    std::vector<float> sums(learned ? slices * groups : 0);
#pragma omp parallel for num_threads(threads) if (outer * groups > CHUNK)
    for (int64_t slice = 0; slice < slices; slice++) {
        for (int64_t k = slice * outer / slices; k < (slice + 1) * outer / slices; k++) {
            const int64_t a = k * groups;
            float *own = learned ? &sums[slice * groups] : nullptr;
            T *rounded = again ? out + a : out;
            auto run = params.step ? gradient_run<true, true, learned, again, T>
                                   : gradient_run<true, false, learned, again, T>;
            run(grad + a, x + a, dx + a, rounded, groups, scales, params, 0, own);
        }
    }
    if constexpr (learned) {
        for (int64_t g = 0; g < groups; g++) {
            double total = 0;
            for (int64_t slice = 0; slice < slices; slice++) total += sums[slice * groups + g];
            dscale[g] = float(total);
        }
    }
}

template <bool learned, bool again, typename T>
void gradients_all(const T *grad, const T *x, T *dx, T *out, Scales scales, Params params, Runs runs, float *dscale,
                   int threads) {
    if (runs.inner == 1)
        gradients_of_columns<learned, again>(grad, x, dx, out, scales, params, runs.outer, runs.groups, dscale, threads);
    else
        gradients_of_runs<learned, again>(grad, x, dx, out, scales, params, runs, dscale, threads);
}

/* Block formats: x is (outer, length, inner), with blocks along the middle axis; the last one may be shorter. */
struct Blocks { int64_t outer, length, inner, block; };

/* nvfp4: rounded block scales b under one float scale g of the tensor. MX: powers of two. */
struct BlockScales {
    int64_t two_level, largest_exponent; // exponent of the element's largest value
    float unit, largest_element;         // MX: step of the elements; nvfp4: value that a block's maximum maps to
    float scale_params[5];               // nvfp4: rounding parameters of its block scales
    float tensor_scale;
};

/* The divisor of a block's elements before rounding, and two factors after. */
struct Factors { float divisor, first, second; };

/* largest: bits of the block's largest magnitude, compared as integers: NaN > infinity > all else. */
INLINE Factors factors_of(int32_t largest, const BlockScales &scales) {
    const bool finite = largest < 0x7F800000;
    if (scales.two_level) {
        const float *n = scales.scale_params, g = scales.tensor_scale;
        float b = round_to(from_bits(largest) / scales.largest_element / g, n[0], n[1], n[2], n[3], n[4]);
        if (!finite) b = from_bits(0x7FC00000);
        else if (!(b * g > 0)) b = 0; // the block is all zero, or its scale underflows
        return {b * g == 0 ? from_bits(0x7F800000) : b * g, b, g};
    }
    int64_t exponent = (largest >> 23) - 127 - scales.largest_exponent;
    exponent = exponent < -127 ? -127 : exponent > 127 ? 127 : exponent;
    const float power = exponent == -127 ? from_bits(0x00400000) : from_bits(int32_t(exponent + 127) << 23);
    const float scale = finite ? power * scales.unit : from_bits(0x7FC00000);
    return {scale, scale, 1.0f};
}

constexpr int64_t LANES = 64; // neighbouring blocks processed together, if inner > 1

/* Largest magnitudes of `lanes` neighbouring blocks that start at x, with a stride of `inner` between elements. */
template <typename T>
INLINE void largest_of(const T *x, int64_t size, int64_t inner, int64_t lanes, int32_t *largest) {
    if (inner == 1) {
        int32_t most = 0;
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < size; i++) {
            const int32_t magnitude = bits(load(x[i])) & 0x7FFFFFFF;
            most = magnitude > most ? magnitude : most;
        }
        *largest = most;
        return;
    }
    for (int64_t l = 0; l < lanes; l++) largest[l] = 0;
    for (int64_t k = 0; k < size; k++)
#pragma omp simd
        for (int64_t l = 0; l < lanes; l++) {
            const int32_t magnitude = bits(load(x[k * inner + l])) & 0x7FFFFFFF;
            largest[l] = magnitude > largest[l] ? magnitude : largest[l];
        }
}

/* Calls work(offset, size, lanes) for each group of up to LANES neighbouring blocks. */
template <typename Work> void for_blocks(Blocks shape, int threads, Work work) {
    const int64_t count = (shape.length + shape.block - 1) / shape.block;
    const int64_t wide = (shape.inner + LANES - 1) / LANES, total = shape.outer * count * wide;
    const int64_t elements = shape.outer * shape.length * shape.inner;
#pragma omp parallel for num_threads(threads) if (elements > CHUNK)
    for (int64_t t = 0; t < total; t++) {
        const int64_t from = t % wide * LANES, k = t / wide % count * shape.block, outer = t / wide / count;
        const int64_t lanes = from + LANES < shape.inner ? LANES : shape.inner - from;
        const int64_t size = k + shape.block < shape.length ? shape.block : shape.length - k;
        work((outer * shape.length + k) * shape.inner + from, size, lanes);
    }
}

template <bool gradient, bool again, typename T>
INLINE void one_block(const T *grad, const T *x, T *dx, T *out, int64_t size, Factors factors, const float *params) {
    const float low = params[0], high = params[1], power = params[2], magic = params[3], sign = params[4];
    const float divisor = factors.divisor, first = factors.first, second = factors.second;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) {
        const float v = load(x[i]) / divisor;
        if constexpr (again) store(out[i], round_to(v, low, high, power, magic, sign) * first * second);
        if constexpr (gradient) {
            const float g = load(grad[i]);
            store(dx[i], (v >= low) & (v <= high) ? g : 0.0f);
        }
    }
}

template <bool gradient, bool again, typename T>
INLINE void across_blocks(const T *grad, const T *x, T *dx, T *out, int64_t lanes, const float *divisors,
                          const float *firsts, float second, const float *params) {
    const float low = params[0], high = params[1], power = params[2], magic = params[3], sign = params[4];
#pragma omp simd
    for (int64_t l = 0; l < lanes; l++) {
        const float v = load(x[l]) / divisors[l];
        if constexpr (again) store(out[l], round_to(v, low, high, power, magic, sign) * firsts[l] * second);
        if constexpr (gradient) {
            const float g = load(grad[l]);
            store(dx[l], (v >= low) & (v <= high) ? g : 0.0f);
        }
    }
}

template <bool gradient, bool again, typename T>
void blocks_all(const T *grad, const T *x, T *dx, T *out, Blocks shape, BlockScales scales, const float *params,
                int threads) {
    if (scales.two_level) {
        int32_t most = 0;
#pragma omp parallel for num_threads(threads) reduction(max : most)
        for (int64_t o = 0; o < shape.outer; o++)
            for_blocks({1, shape.length, shape.inner, shape.block}, 1, [&](int64_t a, int64_t size, int64_t lanes) {
                int32_t largest[LANES];
                largest_of(x + o * shape.length * shape.inner + a, size, shape.inner, lanes, largest);
                for (int64_t l = 0; l < lanes; l++)
                    if (largest[l] < 0x7F800000 && largest[l] > most) most = largest[l];
            });
        scales.tensor_scale = from_bits(most) / (scales.largest_element * scales.scale_params[1]);
    }
    for_blocks(shape, threads, [&](int64_t a, int64_t size, int64_t lanes) {
        int32_t largest[LANES];
        float divisors[LANES], firsts[LANES], second = 1;
        largest_of(x + a, size, shape.inner, lanes, largest);
        if (shape.inner == 1) {
            one_block<gradient, again>(grad + a, x + a, dx + a, out + a, size, factors_of(*largest, scales), params);
            return;
        }
        for (int64_t l = 0; l < lanes; l++) {
            const Factors factors = factors_of(largest[l], scales);
            divisors[l] = factors.divisor, firsts[l] = factors.first, second = factors.second;
        }
        for (int64_t k = a; k < a + size * shape.inner; k += shape.inner)
            across_blocks<gradient, again>(grad + k, x + k, dx + k, out + k, lanes, divisors, firsts, second, params);
    });
}

} // namespace

#define EXPORT(name, T)                                                                                                \
    extern "C" void round_##name(const T *x, T *out, const float *scale, float least, const float *numbers,            \
                                 int64_t stride, int64_t step, int64_t outer, int64_t groups, int64_t inner,           \
                                 int64_t length, int threads) {                                                        \
        round_all(x, out, {scale, least}, {numbers, stride, step}, {outer, groups, inner, length}, threads);           \
    }                                                                                                                  \
    extern "C" void gradients_##name(const T *grad, const T *x, T *dx, T *out, float *dscale, const float *scale,      \
                                     float least, const float *numbers, int64_t stride, int64_t step, int64_t outer,   \
                                     int64_t groups, int64_t inner, int64_t length, int threads) {                     \
        auto run = dscale ? (out ? gradients_all<true, true, T> : gradients_all<true, false, T>)                       \
                          : (out ? gradients_all<false, true, T> : gradients_all<false, false, T>);                    \
        run(grad, x, dx, out, {scale, least}, {numbers, stride, step}, {outer, groups, inner, length}, dscale,         \
            threads);                                                                                                  \
    }                                                                                                                  \
    extern "C" void blocks_##name(const T *grad, const T *x, T *dx, T *out, int64_t outer, int64_t length,             \
                                  int64_t inner, int64_t block, const float *params, int64_t two_level,                \
                                  int64_t largest_exponent, float unit, float largest_element,                         \
                                  const float *scale_params, int threads) {                                            \
        BlockScales scales = {two_level, largest_exponent, unit, largest_element, {}, 1};                              \
        std::memcpy(scales.scale_params, scale_params, sizeof scales.scale_params);                                    \
        auto run = !grad ? blocks_all<false, true, T> : (out ? blocks_all<true, true, T> : blocks_all<true, false, T>);\
        run(grad, x, dx, out, {outer, length, inner, block}, scales, params, threads);                                 \
    }

extern "C" int codes_float32(const float *x, uint8_t *out, const float *scale, float least, const float *params,
                             float codes_of_one, float shift, int64_t outer, int64_t groups, int64_t inner,
                             int threads) {
    return codes_all(x, out, {scale, least}, params, codes_of_one, shift, outer, groups, inner, threads);
}

EXPORT(float32, float)
EXPORT(bfloat16, Bfloat16)
#ifdef __FLT16_MAX__
EXPORT(float16, _Float16)
#endif
