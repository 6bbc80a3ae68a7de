/* Pillow's antialiased resize of RGBX bytes, bit for bit, in vector registers.

   Pillow's resize is integer arithmetic: weights rounded to 22 bits below the point, sums of products rounded and clipped
   to bytes, once across each row and once down each column. The order of such a sum does not matter, so that the same
   bytes come out of eight products at a time. Weights are computed in double precision by the formulas of Pillow's
   Resample.c; `tests/test_model_resize.py` compares the results. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAS_AVX2 1
#else
#define HAS_AVX2 0
#endif

enum { BITS = 22, HALF = 1 << (BITS - 1), CHANNELS = 4, PAIR = 2, ROWS = 4, BLOCK = 32 };

/* Which inputs each output is the weighted sum of: `count[at]` of them from `first[at]`, by `weights[at * most]` on. */
typedef struct {
    int most;
    int *first, *count;
    int32_t *weights;
} taps;

static double bilinear(double x) {
    x = fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

static double bicubic(double x) {
    const double a = -0.5;
    x = fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
    if (x < 2.0) return (((x - 5.0) * x + 8.0) * x - 4.0) * a;
    return 0.0;
}

static void free_taps(taps *t) {
    free(t->first);
    free(t->count);
    free(t->weights);
}

static int make_taps(taps *t, int in, int out, double (*filter)(double), double support) {
    const double scale = (double)in / out, stretch = scale < 1.0 ? 1.0 : scale;
    double *drawn;
    support *= stretch;
    t->most = (int)ceil(support) * 2 + 1;
    t->first = malloc(sizeof(int) * out);
    t->count = malloc(sizeof(int) * out);
    t->weights = calloc((size_t)out * t->most, sizeof(int32_t));
    drawn = malloc(sizeof(double) * t->most);
    if (!t->first || !t->count || !t->weights || !drawn) {
        free(drawn);
        return 0;
    }
    for (int at = 0; at < out; at++) {
        const double centre = (at + 0.5) * scale;
        int first = (int)(centre - support + 0.5), end = (int)(centre + support + 0.5);
        double sum = 0.0;
        first = first < 0 ? 0 : first;
        end = end > in ? in : end;
        for (int k = 0; k < end - first; k++) {
            drawn[k] = filter((k + first - centre + 0.5) * (1.0 / stretch));
            sum += drawn[k];
        }
        for (int k = 0; k < end - first; k++) {
            const double weight = (sum != 0.0 ? drawn[k] / sum : drawn[k]) * (1 << BITS);
            t->weights[(size_t)at * t->most + k] = (int32_t)(weight < 0 ? weight - 0.5 : weight + 0.5);
        }
        t->first[at] = first;
        t->count[at] = end - first;
    }
    free(drawn);
    return 1;
}

static inline uint8_t clipped(int32_t sum) {
    sum >>= BITS;
    return (uint8_t)(sum < 0 ? 0 : sum > 255 ? 255 : sum);
}

/* ROWS rows, `in_bytes` apart, to rows that are `stride` apart: each output is a sum of pairs of pixels, each weight four
   times in a row, as there are channels. A row may be read up to a pixel beyond its last one, whose weight is 0. */
static void across(const uint8_t *from, size_t in_bytes, uint8_t *to, size_t stride, int out, const taps *t,
                   const int32_t *wide, int pairs) {
    for (int row = 0; row < ROWS; row++) {
        for (int at = 0; at < out; at++) {
            const uint8_t *pixels = from + row * in_bytes + (size_t)t->first[at] * CHANNELS;
            const int32_t *w = wide + (size_t)at * pairs * PAIR * CHANNELS;
            int32_t sums[CHANNELS] = {HALF, HALF, HALF, HALF};
            for (int k = 0; k < t->count[at]; k++)
                for (int c = 0; c < CHANNELS; c++) sums[c] += pixels[k * CHANNELS + c] * w[k * CHANNELS + c];
            for (int c = 0; c < CHANNELS; c++) to[row * stride + at * CHANNELS + c] = clipped(sums[c]);
        }
    }
}

/* All rows of the result. Rows of `from` are `stride` bytes apart, a multiple of BLOCK. */
static void down(const uint8_t *from, size_t stride, uint8_t *to, size_t row_bytes, int out, const taps *t) {
    for (int at = 0; at < out; at++) {
        const int32_t *w = t->weights + (size_t)at * t->most;
        const uint8_t *rows = from + (size_t)t->first[at] * stride;
        uint8_t *row = to + (size_t)at * row_bytes;
        for (size_t x = 0; x < row_bytes; x++) {
            int32_t sum = HALF;
            for (int k = 0; k < t->count[at]; k++) sum += rows[k * stride + x] * w[k];
            row[x] = clipped(sum);
        }
    }
}

#if HAS_AVX2
#define WITH_AVX2 __attribute__((target("avx2")))

WITH_AVX2 static void across_avx2(const uint8_t *from, size_t in_bytes, uint8_t *to, size_t stride, int out,
                                  const taps *t, const int32_t *wide, int pairs) {
    for (int at = 0; at < out; at++) {
        const uint8_t *pixels = from + (size_t)t->first[at] * CHANNELS;
        const __m256i *w = (const __m256i *)(wide + (size_t)at * pairs * PAIR * CHANNELS);
        __m256i sums[ROWS];
        for (int row = 0; row < ROWS; row++) sums[row] = _mm256_setzero_si256();
        for (int p = 0; p < (t->count[at] + 1) / PAIR; p++) {
            const __m256i weight = _mm256_loadu_si256(w + p);
            for (int row = 0; row < ROWS; row++) {
                const uint8_t *two = pixels + row * in_bytes + p * PAIR * CHANNELS;
                const __m256i values = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)two));
                sums[row] = _mm256_add_epi32(sums[row], _mm256_mullo_epi32(values, weight));
            }
        }
        __m256i both[ROWS / 2]; /* a row in each half */
        for (int i = 0; i < ROWS / 2; i++) {
            const __m256i even = _mm256_permute2x128_si256(sums[2 * i], sums[2 * i + 1], 0x20);
            const __m256i odd = _mm256_permute2x128_si256(sums[2 * i], sums[2 * i + 1], 0x31);
            both[i] = _mm256_add_epi32(_mm256_add_epi32(even, odd), _mm256_set1_epi32(HALF));
            both[i] = _mm256_srai_epi32(both[i], BITS);
        }
        const __m256i words = _mm256_packs_epi32(both[0], both[1]); /* rows 0 and 2, rows 1 and 3 */
        int32_t four[8];
        _mm256_storeu_si256((__m256i *)four, _mm256_packus_epi16(words, words));
        memcpy(to + at * CHANNELS, &four[0], CHANNELS);
        memcpy(to + stride + at * CHANNELS, &four[4], CHANNELS);
        memcpy(to + 2 * stride + at * CHANNELS, &four[1], CHANNELS);
        memcpy(to + 3 * stride + at * CHANNELS, &four[5], CHANNELS);
    }
}

WITH_AVX2 static void down_avx2(const uint8_t *from, size_t stride, uint8_t *to, size_t row_bytes, int out,
                                const taps *t) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int at = 0; at < out; at++) {
        const int32_t *w = t->weights + (size_t)at * t->most;
        const uint8_t *rows = from + (size_t)t->first[at] * stride;
        uint8_t *row = to + (size_t)at * row_bytes;
        for (size_t x = 0; x < row_bytes; x += BLOCK) {
            __m256i sums[4];
            for (int i = 0; i < 4; i++) sums[i] = _mm256_set1_epi32(HALF);
            for (int k = 0; k < t->count[at]; k++) {
                const __m256i weight = _mm256_set1_epi32(w[k]);
                const uint8_t *values = rows + k * stride + x;
                for (int i = 0; i < 4; i++) {
                    const __m256i eight = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(values + 8 * i)));
                    sums[i] = _mm256_add_epi32(sums[i], _mm256_mullo_epi32(eight, weight));
                }
            }
            for (int i = 0; i < 4; i++) sums[i] = _mm256_srai_epi32(sums[i], BITS);
            const __m256i low = _mm256_packs_epi32(sums[0], sums[1]), high = _mm256_packs_epi32(sums[2], sums[3]);
            const __m256i done = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
            if (row_bytes - x >= BLOCK) {
                _mm256_storeu_si256((__m256i *)(row + x), done);
            } else {
                uint8_t last[BLOCK];
                _mm256_storeu_si256((__m256i *)last, done);
                memcpy(row + x, last, row_bytes - x);
            }
        }
    }
}
#endif

static int resample(const uint8_t *from, int height, int width, uint8_t *to, int out_height, int out_width,
                    double (*filter)(double), double support) {
    taps h = {0}, v = {0};
    const size_t in_bytes = (size_t)width * CHANNELS, row_bytes = (size_t)out_width * CHANNELS;
    const size_t stride = (row_bytes + BLOCK - 1) / BLOCK * BLOCK;
    int is_done = 0, pairs = 0;
    void (*rows_across)(const uint8_t *, size_t, uint8_t *, size_t, int, const taps *, const int32_t *, int) = across;
    void (*all_down)(const uint8_t *, size_t, uint8_t *, size_t, int, const taps *) = down;
    int32_t *wide = NULL;
    uint8_t *between = malloc((height + ROWS) * stride), *padded = calloc(ROWS * in_bytes + CHANNELS, 1);
    if (!between || !padded || !make_taps(&h, width, out_width, filter, support) ||
        !make_taps(&v, height, out_height, filter, support))
        goto end;
    pairs = (h.most + PAIR - 1) / PAIR;
    wide = calloc((size_t)out_width * pairs, PAIR * CHANNELS * sizeof(int32_t));
    if (!wide) goto end;
    for (int at = 0; at < out_width; at++)
        for (int k = 0; k < h.count[at]; k++)
            for (int c = 0; c < CHANNELS; c++)
                wide[((size_t)at * pairs * PAIR + k) * CHANNELS + c] = h.weights[(size_t)at * h.most + k];
#if HAS_AVX2
    if (__builtin_cpu_supports("avx2")) {
        rows_across = across_avx2;
        all_down = down_avx2;
    }
#endif
    for (int y = 0; y < height; y += ROWS) {
        const uint8_t *rows = from + y * in_bytes;
        if (height - y <= ROWS) { /* beyond the others lies the next row */
            memcpy(padded, rows, (height - y) * in_bytes);
            rows = padded;
        }
        rows_across(rows, in_bytes, between + y * stride, stride, out_width, &h, wide, pairs);
    }
    all_down(between, stride, to, row_bytes, out_height, &v);
    is_done = 1;
end:
    free(between);
    free(padded);
    free(wide);
    free_taps(&h);
    free_taps(&v);
    return is_done;
}

static PyObject *py_resample(PyObject *self, PyObject *args) {
    Py_buffer from, to;
    int height, width, out_height, out_width, filter, is_done = 0;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*iiw*iii", &from, &height, &width, &to, &out_height, &out_width, &filter)) return NULL;
    const int is_fine = height > 0 && width > 0 && out_height > 0 && out_width > 0 && (filter == 2 || filter == 3) &&
                        from.len == (Py_ssize_t)height * width * CHANNELS &&
                        to.len == (Py_ssize_t)out_height * out_width * CHANNELS;
    if (is_fine) {
        Py_BEGIN_ALLOW_THREADS
        is_done = resample(from.buf, height, width, to.buf, out_height, out_width, filter == 3 ? bicubic : bilinear,
                           filter == 3 ? 2.0 : 1.0);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&from);
    PyBuffer_Release(&to);
    if (!is_fine) {
        PyErr_SetString(PyExc_ValueError, "sizes and buffers of height x width x 4 bytes must agree; filter is 2 or 3");
        return NULL;
    }
    if (!is_done) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

/* A part of an image without its fourth bytes, which numpy copies three bytes at a time. */
static PyObject *py_crop(PyObject *self, PyObject *args) {
    Py_buffer from, to;
    int height, width, top, left, out_height, out_width;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*iiiiw*ii", &from, &height, &width, &top, &left, &to, &out_height, &out_width)) return NULL;
    const int is_fine = height > 0 && width > 0 && top >= 0 && left >= 0 && out_height > 0 && out_width > 0 &&
                        out_height <= height - top && out_width <= width - left && from.len == (Py_ssize_t)height * width * CHANNELS &&
                        to.len == (Py_ssize_t)out_height * out_width * 3;
    for (int y = 0; is_fine && y < out_height; y++) {
        const uint8_t *pixel = (const uint8_t *)from.buf + ((size_t)(top + y) * width + left) * CHANNELS;
        uint8_t *out = (uint8_t *)to.buf + (size_t)y * out_width * 3;
        for (int x = 0; x < out_width - 1; x++, pixel += CHANNELS, out += 3) memcpy(out, pixel, CHANNELS);
        memcpy(out, pixel, 3); /* the others write a byte too many, which the next one puts right */
    }
    PyBuffer_Release(&from);
    PyBuffer_Release(&to);
    if (is_fine) Py_RETURN_NONE;
    PyErr_SetString(PyExc_ValueError, "the part must lie in the image, with buffers of 4 and of 3 bytes a pixel");
    return NULL;
}

static PyMethodDef methods[] = {
    {"resample", py_resample, METH_VARARGS, "resample(pixels, height, width, out, out_height, out_width, filter)"},
    {"crop", py_crop, METH_VARARGS, "crop(pixels, height, width, top, left, out, out_height, out_width)"},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_resample", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__resample(void) { return PyModule_Create(&module); }
