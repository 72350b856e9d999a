/* The row step on a CPU: what loss/rows.py computes in plain torch, done row by row while a row is in the cache.
 *
 *   p = e / l,  e = exp(z - m),  l = sum e,  m = max z        of the student's logits
 *   q = f / L,  f = exp((t - M) / tau), ...                    of the teacher's
 *   KL(q || p) = sum f ((t - M) / tau - (z - m)) / L - log L + log l
 *   dz = data (p - gold_weight onehot - every_weight) + teacher (p - q) + uniform (p - 1/V) + data beta p (log p + H)
 *
 * native/rows.py compiles this file on first use. Each thread converts a row of either head to fp32 in its own buffer
 * and keeps e and f there, so that a row is read once and its exponentials are computed once.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { FP32, BF16, FP16 };           /* dtype of the logits */
/* Modes: only the statistics; only the gradient, from statistics and weights; both, with given weights; both, with the
 * gate "token"; both, with the gate "token" and given log-probabilities of the teacher (TEACHER_READ), except that no
 * gradient is written in rows that the gate gives to the teacher. */
enum { STATISTICS_ALONE, GRADIENT_ALONE, WEIGHTED, TOKEN, TOKEN_CLOSED };

/* Rows of `statistics`, (11, rows); native/rows.py has the same order. */
enum { STUDENT_MAX, STUDENT_SUM, TEACHER_MAX, TEACHER_SUM, STUDENT_READ, TEACHER_READ, GOLD, MEAN, ENTROPY, KL,
       TEACHER_ENTROPY };

enum { NO_MEMORY = 1, NO_SUCH_TOKEN };

enum { BLOCK = 2048 }; /* maximum length of an fp32 partial sum; a block of each head fits the L1 cache */

/* exp(x) for x <= 0 with relative error 1.7e-7 (coefficients of Cephes' expf); 0 below -87.3; nan stays nan. */
static inline float exp_nonpositive(float x) {
    float y = x < -87.3f ? -87.3f : x;
    float n = rintf(y * 1.44269504088896341f);
    float r = y - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return x < -87.3f ? 0.0f : p * power;
}

static inline float from_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Rounds to nearest, ties to even. */
static inline uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits += 0x7fff + (bits >> 16 & 1);
    return x == x ? (uint16_t)(bits >> 16) : 0x7fc0;
}

/* Whether fp16 is supported: old compilers lack _Float16 on some processors. */
int knows_half(void) {
#ifdef __FLT16_MAX__
    return 1;
#else
    return 0;
#endif
}

/* Converts a row to fp32 in `out` and returns its maximum. */
static float widen(float *restrict out, const void *restrict row, int64_t size, int dtype) {
    float most = -INFINITY;
    if (dtype == FP32) {
        const float *in = row;
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < size; i++) {
            out[i] = in[i];
            most = out[i] > most ? out[i] : most;
        }
    } else if (dtype == BF16) {
        const uint16_t *in = row;
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < size; i++) {
            out[i] = from_bf16(in[i]);
            most = out[i] > most ? out[i] : most;
        }
    } else {
#ifdef __FLT16_MAX__
        const _Float16 *in = row;
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < size; i++) {
            out[i] = (float)in[i];
            most = out[i] > most ? out[i] : most;
        }
#endif
    }
    return most;
}

static void narrow(void *restrict row, const float *restrict in, int64_t size, int dtype) {
    if (dtype == FP32) {
        memcpy(row, in, size * sizeof *in);
    } else if (dtype == BF16) {
        uint16_t *out = row;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) out[i] = to_bf16(in[i]);
    } else {
#ifdef __FLT16_MAX__
        _Float16 *out = row;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) out[i] = (_Float16)in[i];
#endif
    }
}

typedef struct {
    double student, shifted, entropy; /* l, sum (z - m), sum e (z - m) */
    double teacher, difference, teacher_entropy; /* L, sum f ((t - M) / tau - (z - m)), sum f (t - M) / tau */
} Sums;

/* Replaces z by e and, unless t is NULL, t by f; returns their sums. */
static Sums exponentials(float *restrict z, float *restrict t, int64_t size, float m, float M, float inverse_temperature) {
    Sums sums = {0};
    for (int64_t start = 0; start < size; start += BLOCK) {
        int64_t end = start + BLOCK < size ? start + BLOCK : size;
        float l = 0, shifted = 0, entropy = 0, L = 0, difference = 0, teacher_entropy = 0;
        if (t) {
#pragma omp simd reduction(+ : l, shifted, entropy, L, difference, teacher_entropy)
            for (int64_t i = start; i < end; i++) {
                float a = z[i] - m, b = (t[i] - M) * inverse_temperature;
                float e = exp_nonpositive(a), f = exp_nonpositive(b);
                z[i] = e;
                t[i] = f;
                l += e;
                shifted += a;
                entropy += e > 0 ? e * a : 0.0f; /* 0 instead of 0 * inf where p underflows, as for an excluded token */
                L += f;
                difference += f > 0 ? f * (b - a) : 0.0f; /* 0 instead of 0 * inf where q underflows */
                teacher_entropy += f > 0 ? f * b : 0.0f;
            }
        } else {
#pragma omp simd reduction(+ : l, shifted, entropy)
            for (int64_t i = start; i < end; i++) {
                float a = z[i] - m;
                float e = exp_nonpositive(a);
                z[i] = e;
                l += e;
                shifted += a;
                entropy += e > 0 ? e * a : 0.0f;
            }
        }
        sums.student += l;
        sums.shifted += shifted;
        sums.entropy += entropy;
        sums.teacher += L;
        sums.difference += difference;
        sums.teacher_entropy += teacher_entropy;
    }
    return sums;
}

/* Returns log sum exp(t - M), the teacher's log-normalizer at temperature 1. */
static float log_sum(const float *t, int64_t size, float M) {
    double sum = 0;
    for (int64_t start = 0; start < size; start += BLOCK) {
        int64_t end = start + BLOCK < size ? start + BLOCK : size;
        float part = 0;
#pragma omp simd reduction(+ : part)
        for (int64_t i = start; i < end; i++) part += exp_nonpositive(t[i] - M);
        sum += part;
    }
    return logf((float)sum);
}

/* Returns the lowest index of the maximum m. */
static int64_t position(const float *z, int64_t size, float m) {
    for (int64_t i = 0; i < size; i++)
        if (z[i] == m) return i;
    return 0;
}

static inline const void *at(const void *logits, int64_t index, int dtype) {
    return (const char *)logits + index * (dtype == FP32 ? 4 : 2);
}

typedef struct {
    float student, teacher, every;    /* dz = student e - teacher f - every */
    float ratio, constant;            /* for the confidence penalty e is replaced by e (1 + ratio (z + constant)) */
    float gold;                       /* subtracted at the gold token */
} Factors;

/* Returns the factors of a row's gradient from its statistics m, l, L, H and its weights. */
static Factors factors(float data, float teacher, float uniform, float m, float l, float L, float entropy,
                       float gold_weight, float every_weight, float penalty, float scale, int64_t V) {
    float whole = data + teacher + uniform;
    return (Factors){
        .student = scale * whole / l,
        .teacher = teacher != 0 && L != 0 ? scale * teacher / L : 0, /* L is 0 without teacher's logits */
        .every = scale * (data * every_weight + uniform / V),
        .ratio = penalty != 0 && data != 0 ? penalty * data / whole : 0,
        .constant = entropy - logf(l) - m,
        .gold = scale * data * gold_weight,
    };
}

/* Writes the gradient over a row of the student's logits. It is computed from the exponentials of each head or, where
 * they are NULL, from its logits. */
static void write_gradient(char *row, const void *teacher, const float *exponentials_s, const float *exponentials_t,
                           int64_t V, int64_t gold, float m, float M, float inverse_temperature, Factors by, int dtype,
                           int teacher_dtype) {
    float z[BLOCK], e[BLOCK], f[BLOCK];
    for (int64_t start = 0; start < V; start += BLOCK) {
        int64_t size = start + BLOCK < V ? BLOCK : V - start;
        void *out = (void *)at(row, start, dtype);
        if (!exponentials_s || by.ratio != 0) widen(z, out, size, dtype);
        if (exponentials_s) {
            memcpy(e, exponentials_s + start, size * sizeof *e);
        } else {
#pragma omp simd
            for (int64_t i = 0; i < size; i++) e[i] = exp_nonpositive(z[i] - m);
        }
        if (by.ratio != 0) {
#pragma omp simd
            for (int64_t i = 0; i < size; i++) e[i] *= e[i] > 0 ? 1 + by.ratio * (z[i] + by.constant) : 1;
        }
        if (by.teacher == 0) {
#pragma omp simd
            for (int64_t i = 0; i < size; i++) e[i] = e[i] * by.student - by.every;
        } else if (exponentials_t) {
            const float *known = exponentials_t + start;
#pragma omp simd
            for (int64_t i = 0; i < size; i++) e[i] = e[i] * by.student - known[i] * by.teacher - by.every;
        } else {
            widen(f, at(teacher, start, teacher_dtype), size, teacher_dtype);
#pragma omp simd
            for (int64_t i = 0; i < size; i++)
                e[i] = e[i] * by.student - exp_nonpositive((f[i] - M) * inverse_temperature) * by.teacher - by.every;
        }
        if (start <= gold && gold < start + size) e[gold - start] -= by.gold;
        narrow(out, e, size, dtype);
    }
}

/* Processes `count` rows of a chunk. Returns 0, NO_MEMORY or NO_SUCH_TOKEN (a target is outside the vocabulary). */
int rows(
    void *student,         /* (rows, V), contiguous; overwritten by the gradient unless mode is STATISTICS_ALONE */
    const void *teacher,   /* (count, V), contiguous, not tempered; NULL: no teacher */
    const int64_t *target, /* (rows,) */
    float *statistics,     /* (11, rows): output; input of GRADIENT_ALONE; TOKEN_CLOSED also reads TEACHER_READ */
    uint8_t *correct,      /* (rows,) output, whether the argmax is the target; NULL: not requested */
    const float *data, const float *teacher_weight, /* (rows,) in modes GRADIENT_ALONE and WEIGHTED */
    const float *uniform,                           /* (rows,) or NULL */
    const int64_t *places, /* (count,) indices of the rows to process, the only ones in `teacher`; NULL: all rows */
    int64_t count, int64_t stride, int64_t V, /* stride: total number of rows, that is, the stride of `statistics` */
    int dtype, int teacher_dtype, int mode, int threads, int read_argmax, int untempered_gate,
    float inverse_temperature, float gold_weight, float every_weight, float penalty, float scale
) {
    size_t buffer_bytes = (V * sizeof(float) + 63) / 64 * 64;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *z = mode == GRADIENT_ALONE ? NULL : aligned_alloc(64, buffer_bytes);
        float *t = mode == GRADIENT_ALONE || !teacher ? NULL : aligned_alloc(64, buffer_bytes);
        int problem = mode != GRADIENT_ALONE && (!z || (teacher && !t)) ? NO_MEMORY : 0;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; i++) {
            int64_t row = places ? places[i] : i;
            int64_t gold = target[row], read = gold;
            if (gold < 0 || gold >= V) problem = NO_SUCH_TOKEN;
            if (problem) continue;
            char *student_row = (char *)at(student, row * V, dtype);
            const void *teacher_row = teacher ? at(teacher, i * V, teacher_dtype) : NULL;
            float *found = statistics + row;
            if (mode == GRADIENT_ALONE) {
                float m = found[STUDENT_MAX * stride], M = found[TEACHER_MAX * stride];
                Factors by = factors(data[row], teacher_weight[row], uniform ? uniform[row] : 0, m,
                                     found[STUDENT_SUM * stride], found[TEACHER_SUM * stride],
                                     found[ENTROPY * stride], gold_weight, every_weight, penalty, scale, V);
                write_gradient(student_row, teacher_row, NULL, NULL, V, gold, m, M, inverse_temperature, by, dtype,
                               teacher_dtype);
                continue;
            }
            float m = widen(z, student_row, V, dtype), M = teacher ? widen(t, teacher_row, V, teacher_dtype) : 0;
            if (correct) {
                int64_t best = position(z, V, m);
                correct[row] = best == gold;
                if (read_argmax) read = best;
            }
            float gold_shifted = z[gold] - m, read_shifted = z[read] - m;
            float teacher_shifted = teacher ? t[read] - M : 0;
            float gate_log_sum = teacher && untempered_gate ? log_sum(t, V, M) : 0;
            Sums sums = exponentials(z, t, V, m, M, inverse_temperature);
            float l = (float)sums.student, L = (float)sums.teacher, log_l = logf(l), log_L = logf(L);
            float student_read = read_shifted - log_l, entropy = log_l - (float)(sums.entropy / sums.student);
            float teacher_read = mode == TOKEN_CLOSED ? found[TEACHER_READ * stride]
                                 : !teacher           ? student_read
                                 : untempered_gate ? teacher_shifted - gate_log_sum
                                                   : teacher_shifted * inverse_temperature - log_L;
            found[STUDENT_MAX * stride] = m;
            found[STUDENT_SUM * stride] = l;
            found[TEACHER_MAX * stride] = M;
            found[TEACHER_SUM * stride] = L;
            found[STUDENT_READ * stride] = student_read;
            found[TEACHER_READ * stride] = teacher_read;
            found[GOLD * stride] = gold_shifted - log_l;
            found[MEAN * stride] = (float)(sums.shifted / V) - log_l;
            found[ENTROPY * stride] = entropy;
            found[KL * stride] = teacher ? (float)(sums.difference / sums.teacher) - log_L + log_l : 0;
            found[TEACHER_ENTROPY * stride] = teacher ? log_L - (float)(sums.teacher_entropy / sums.teacher) : 0;
            if (mode == STATISTICS_ALONE || (mode == TOKEN_CLOSED && student_read > teacher_read)) continue;
            /* Gate "token", a strict inequality: a token of equal probability is learned from the data. */
            float to_teacher = student_read > teacher_read, to_data = 1 - to_teacher, to_uniform = 0;
            if (mode == WEIGHTED) {
                to_data = data[row];
                to_teacher = teacher ? teacher_weight[row] : 0;
                to_uniform = uniform ? uniform[row] : 0;
            }
            Factors by = factors(to_data, to_teacher, to_uniform, m, l, L, entropy, gold_weight, every_weight, penalty,
                                 scale, V);
            write_gradient(student_row, teacher_row, z, t, V, gold, m, M, inverse_temperature, by, dtype, teacher_dtype);
        }
        if (problem) {
#pragma omp atomic write
            failed = problem;
        }
        free(z);
        free(t);
    }
    return failed;
}
