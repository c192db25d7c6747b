// What evidence_cross_entropy needs of each exponential family (bllkern/families.py), one row a lane.
//
// With the parameters of a row prepared as R values and those of a message as M values per unit:
//   add(acc, row, message)     one unit's part of the log evidence A(a + b) - A(a), as summands or as factors of which
//                              only one logarithm is taken; log evidence = kSum sum + kLog log(product)
//   kUnits                     units summed in float before they are added to a sum in double
//   size(b, b_0)               bounds the logarithm of the factors: they lie between e^-size and e^size; infinity where
//                              there is no bound
//   slope(row, message, e, ..) e is the softmax error.  Adds to sums over classes and over rows, of which
//   by_a(row, sums) and by_message(b, sums, sum of e) make the gradients sum_c e (mean(a + b_c) - mean(a)) and
//   sum_n e mean(a + b_c).
// Where a message is 0 the log evidence is 0: that is how units past the end are filled.
//
// kRelative: rows are prepared from a + b_0 and messages from b_c - b_0, b_0 the mean message.  That takes
// A(a + b_0) - A(a) from the log evidence of every class and, the error summing to 0 over classes, nothing from the
// gradients.
#pragma once

#include "elementary.h"

namespace bllkern::BLLKERN_ISA {

// Messages b beyond it are treated one by one (csrc/evidence_wide.h).  A factor e^b up to e^60 leaves e^28 = 10^12
// below the largest float to the sums over group members and rows, and its reciprocal e^27 above the smallest normal.
constexpr float kWide = 60.f;

struct Evidence {
    Lanes sum = {}, product = splat<Lanes>(1.f);
};

// e^b and e^b - 1 for any b
BLLKERN_INLINE Exponential<Lanes> exp_and_minus_one(Lanes b) {
    Lanes low = at_least(b, splat<Lanes>(-87.f));
    Exponential<Lanes> e = exp_in_range(select(low > 88.f, splat<Lanes>(88.f), low));
    Lanes infinity = splat<Lanes>(__builtin_inff());
    return {
        select(b < -87.f, splat<Lanes>(0.f), select(b > 88.f, infinity, e.value)),
        select(b < -87.f, splat<Lanes>(-1.f), select(b > 88.f, infinity, e.minus_one)),
    };
}

BLLKERN_INLINE Ints is_wide(Lanes b) { return ~((b <= kWide) & (b >= -kWide)); }

// With s = sigmoid(a), t = 1 - s and v = e^b:  A(a + b) - A(a) = log(t + s v), whose terms are positive, and
// mean(a + b) = s v / (t + s v).  mean(a + b) - mean(a) = s t (v - 1) / (t + s v).
struct BernoulliEvidence {
    static constexpr int kParameters = 1, kRow = 2, kMessage = 2, kAccumulators = 1;
    static constexpr bool kFactors = true, kGrouped = false, kLarge = false, kExponential = true, kRelative = false;
    static constexpr double kSum = 0, kLog = 1;
    static constexpr int64_t kUnits = 256;
    static constexpr float kFill[1] = {0.f};

    BLLKERN_INLINE void row(const Lanes (&a)[1], Lanes (&out)[2]) {
        Lanes p = exp_nonpositive(negative_abs(a[0])).value, near = divide(splat<Lanes>(1.f), p + 1.f), far = p * near;
        out[0] = select(a[0] > 0.f, far, near);
        out[1] = select(a[0] > 0.f, near, far);
    }
    BLLKERN_INLINE Lanes size(const Lanes (&b)[1], const Lanes (&)[1]) {
        return select(b[0] == b[0], -negative_abs(b[0]), splat<Lanes>(__builtin_inff()));
    }
    BLLKERN_INLINE void message(const Lanes (&b)[1], Lanes (&out)[2]) {
        Exponential<Lanes> e = exp_in_range(select(is_wide(b[0]), splat<Lanes>(0.f), b[0]));
        out[0] = e.value, out[1] = e.minus_one;
    }
    BLLKERN_INLINE void add(Evidence& evidence, const Lanes (&row)[2], const Lanes (&message)[2]) {
        evidence.product *= row[1] * message[0] + row[0];
    }
    BLLKERN_INLINE void slope(const Lanes (&row)[2], const Lanes (&message)[2], Lanes e, Lanes (&over_classes)[1],
                              Lanes (&over_rows)[1]) {
        Lanes q = e * reciprocal(row[1] * message[0] + row[0]);
        over_classes[0] += q * message[1];
        over_rows[0] += q * row[1];
    }
    BLLKERN_INLINE void by_a(const Lanes (&row)[2], Lanes (&sums)[1]) { sums[0] *= row[0] * row[1]; }
    BLLKERN_INLINE void by_message(const Lanes (&b)[1], Lanes (&sums)[1], Lanes) {
        sums[0] = select(is_wide(b[0]), splat<Lanes>(0.f), sums[0] * exp(b[0]));
    }
};

// With p = softmax(a) in each group and v = e^b:  log sum_j p_j v_j, and mean_j(a + b) = p_j v_j / sum_k p_k v_k.
// by_a is p_j (h_j - sum_k p_k h_k) with h_j = sum_c e (v_j - 1) / sum_k p_k v_k: the kernels, which know the groups,
// make it.
struct CategoricalEvidence : BernoulliEvidence {
    static constexpr int kRow = 1, kAccumulators = 2;
    static constexpr bool kGrouped = true;

    BLLKERN_INLINE void row(const Lanes (&a)[1], Lanes (&out)[1]) { out[0] = a[0]; }
    BLLKERN_INLINE void add(Evidence& evidence, const Lanes (&row)[1], const Lanes (&message)[2]) {
        evidence.sum += row[0] * message[0];
    }
    BLLKERN_INLINE void close_group(Evidence& evidence) {
        evidence.product *= evidence.sum;
        evidence.sum = splat<Lanes>(0.f);
    }
};

// A categorical group too large for one block: the sums of p_j v_j and of p_j (v_j - 1), which differ by 1 and are each
// exact where they are small.  e comes divided by the first.
struct LargeGroupEvidence : CategoricalEvidence {
    static constexpr bool kFactors = false, kGrouped = false, kLarge = true;

    BLLKERN_INLINE void add(Evidence& evidence, const Lanes (&row)[1], const Lanes (&message)[2]) {
        evidence.sum += row[0] * message[0];
        evidence.product += row[0] * message[1];
    }

    BLLKERN_INLINE void slope(const Lanes (&row)[1], const Lanes (&message)[2], Lanes e, Lanes (&over_classes)[1],
                              Lanes (&over_rows)[1]) {
        over_classes[0] += e * message[1];
        over_rows[0] += e * row[0];
    }
};

// a b + b^2/2: the second term is added once per class.  mean(a + b) - mean(a) = b.
struct GaussianEvidence {
    static constexpr int kParameters = 1, kRow = 1, kMessage = 1, kAccumulators = 1;
    static constexpr bool kFactors = false, kGrouped = false, kLarge = false, kExponential = false, kRelative = false;
    static constexpr double kSum = 1, kLog = 0;
    static constexpr int64_t kUnits = 128;
    static constexpr float kFill[1] = {0.f};

    BLLKERN_INLINE void row(const Lanes (&a)[1], Lanes (&out)[1]) { out[0] = a[0]; }
    BLLKERN_INLINE Lanes size(const Lanes (&)[1], const Lanes (&)[1]) { return splat<Lanes>(0.f); }
    BLLKERN_INLINE void message(const Lanes (&b)[1], Lanes (&out)[1]) { out[0] = b[0]; }
    BLLKERN_INLINE void add(Evidence& evidence, const Lanes (&row)[1], const Lanes (&message)[1]) {
        evidence.sum += row[0] * message[0];
    }
    BLLKERN_INLINE void slope(const Lanes (&row)[1], const Lanes (&message)[1], Lanes e, Lanes (&over_classes)[1],
                              Lanes (&over_rows)[1]) {
        over_classes[0] += e * message[0];
        over_rows[0] += e * row[0];
    }
    BLLKERN_INLINE void by_a(const Lanes (&)[1], Lanes (&)[1]) {}
    BLLKERN_INLINE void by_message(const Lanes (&b)[1], Lanes (&sums)[1], Lanes e) { sums[0] += b[0] * e; }
};

// e^a (e^b - 1), which is mean(a + b) - mean(a) as well.
struct PoissonEvidence : GaussianEvidence {
    BLLKERN_INLINE void row(const Lanes (&a)[1], Lanes (&out)[1]) { out[0] = exp(a[0]); }
    BLLKERN_INLINE void message(const Lanes (&b)[1], Lanes (&out)[1]) { out[0] = exp_and_minus_one(b[0]).minus_one; }
    BLLKERN_INLINE void by_a(const Lanes (&row)[1], Lanes (&sums)[1]) { sums[0] *= row[0]; }
    BLLKERN_INLINE void by_message(const Lanes (&b)[1], Lanes (&sums)[1], Lanes) { sums[0] *= exp(b[0]); }
};

// Precisions p = -2 a[1] and p + q with q = -2 b[1].  Relative to b_0, with q_0 and so on: precision P = p + q_0,
// variance w = 1/P, mean m = (a[0] + b_0[0]) w, differences B = b[0] - b_0[0] and Q = q - q_0, and f = (p + q)/P:
//   log evidence = (a[0] + b[0])^2/(2 P f) - m^2 P/2 - log(f)/2 = (m (2 B - Q m) + B^2 w)/(2f) - log(f)/2.
// The posterior has variance r = w/f and mean M = m + d, d = (B - Q m) r; its second moment M^2 + r exceeds m^2 + w by
// d (M + m) - Q w r.  Relative to b = 0 these would be differences of the large moments of a where messages are far
// more precise; f is a quotient of sums because 1 + Q w would cancel where a message is far less precise than the mean
// one.
struct GaussianLearnedEvidence {
    static constexpr int kParameters = 2, kRow = 3, kMessage = 3, kAccumulators = 2;
    static constexpr bool kFactors = true, kGrouped = false, kLarge = false, kExponential = false, kRelative = true;
    static constexpr double kSum = 0.5, kLog = -0.5;
    static constexpr int64_t kUnits = 128;
    static constexpr float kFill[2] = {0.f, -0.5f};

    BLLKERN_INLINE void row(const Lanes (&a)[2], const Lanes (&b_0)[2], Lanes (&out)[3]) {
        out[0] = divide(splat<Lanes>(-0.5f), a[1] + b_0[1]);
        out[1] = (a[0] + b_0[0]) * out[0];
        out[2] = a[1] * -2.f;
    }
    // f lies between 1 and b[1] / b_0[1]
    BLLKERN_INLINE Lanes size(const Lanes (&b)[2], const Lanes (&b_0)[2]) {
        Lanes ratio = divide(b[1], b_0[1]), factor = max(ratio, divide(b_0[1], b[1]));
        Lanes bound = log(max(factor, splat<Lanes>(1.f)));
        Lanes unbounded = splat<Lanes>(__builtin_inff());
        return select((ratio > 0.f) & (b[1] < 0.f), bound, unbounded);
    }
    BLLKERN_INLINE void message(const Lanes (&b)[2], const Lanes (&b_0)[2], Lanes (&out)[3]) {
        out[0] = (b[1] - b_0[1]) * -2.f;
        out[1] = b[0] - b_0[0];
        out[2] = b[1] * -2.f;
    }
    BLLKERN_INLINE void add(Evidence& evidence, const Lanes (&row)[3], const Lanes (&message)[3]) {
        Lanes w = row[0], m = row[1], q = message[0], b = message[1];
        Lanes f = (row[2] + message[2]) * w;
        evidence.product *= f;
        evidence.sum += (m * (b + b - q * m) + b * b * w) * reciprocal(f);
    }
    BLLKERN_INLINE void slope(const Lanes (&row)[3], const Lanes (&message)[3], Lanes e, Lanes (&over_classes)[2],
                              Lanes (&over_rows)[2]) {
        Lanes w = row[0], m = row[1], q = message[0], r = reciprocal(row[2] + message[2]);
        Lanes d = (message[1] - q * m) * r, mean = m + d;
        over_classes[0] += e * d;
        over_classes[1] += e * (d * (mean + m) - q * w * r);
        over_rows[0] += e * mean;
        over_rows[1] += e * (mean * mean + r);
    }
    BLLKERN_INLINE void by_a(const Lanes (&)[3], Lanes (&)[2]) {}
    BLLKERN_INLINE void by_message(const Lanes (&)[2], Lanes (&)[2], Lanes) {}
};

}  // namespace bllkern::BLLKERN_ISA
