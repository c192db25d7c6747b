#include "agreement.h"

#include "families.h"

// An item is what one team of threads scores: a part of at most kPart units of a row, or one categorical group.  Each
// block leaves one fp32 partial sum (each item does, where every row has a loss of its own); a second kernel adds them
// up in double and in a fixed order.
namespace bllkern::device {
namespace {

constexpr int64_t kPart = 4096;

template <class T> struct Problem {
    const T* __restrict__ a;   // [rows, width]
    const T* __restrict__ b;   // [rows, width]
    T* __restrict__ grad_a;    // [rows, width] or null
    T* __restrict__ grad_b;    // [rows, width] or null
    float* __restrict__ partials;
    int64_t items, items_per_row, units, part;  // units of a row (of a group), units of an item
    int team;                                   // threads per item
    float scale;
    bool vectors, per_item;
};

// Every thread of the block calls it with the loss that it has gathered for its item.
template <class T>
BLLKERN_INLINE void keep(const Problem<T>& problem, const Team& team, int64_t item, float loss) {
    if (problem.per_item) {
        loss = combine<Add>(loss, team);
        if (team.lane == 0 && item < problem.items) problem.partials[item] = loss;
    } else {
        loss = combine<Add>(loss, Team(kBlock));
        if (threadIdx.x == 0) problem.partials[blockIdx.x] = loss;
    }
}

template <class F, class T> __global__ void __launch_bounds__(kBlock, 1) separate(const Problem<T> problem) {
    constexpr int N = F::kParameters;
    const Team team(problem.team);
    const int64_t item = (int64_t{blockIdx.x} * kBlock + threadIdx.x) / team.count;
    const int64_t row = item / problem.items_per_row, begin = item % problem.items_per_row * problem.part;
    const int64_t left = problem.units - begin, count = left < problem.part ? left : problem.part;
    float loss = 0;
    for (int64_t done = 0; item < problem.items && done < count; done += kHeld * team.count) {
        const int64_t at = row * problem.units * N + begin + done, n = count - done;
        float a[N][kHeld], b[N][kHeld];
#pragma unroll
        for (int c = 0; c < N; c++) {
            load(a[c], problem.a + at + c * problem.units, n, team, problem.vectors, 0.f);
            load(b[c], problem.b + at + c * problem.units, n, team, problem.vectors, 0.f);
        }
#pragma unroll
        for (int j = 0; j < kHeld; j++) {
            if (place<T>(team, problem.vectors, j) >= n) continue;
            float one_a[N], one_b[N];
#pragma unroll
            for (int c = 0; c < N; c++) one_a[c] = a[c][j], one_b[c] = b[c][j];
            Agreement<float, N> result = F::agreement(one_a, one_b);
            loss += result.loss;
#pragma unroll
            for (int c = 0; c < N; c++) {
                a[c][j] = result.by_a[c] * problem.scale;
                b[c][j] = result.by_b[c] * problem.scale;
            }
        }
#pragma unroll
        for (int c = 0; c < N; c++) {
            if (problem.grad_a) store(problem.grad_a + at + c * problem.units, a[c], n, team, problem.vectors);
            if (problem.grad_b) store(problem.grad_b + at + c * problem.units, b[c], n, team, problem.vectors);
        }
    }
    keep(problem, team, item, loss);
}

// e^(a + b - highest), where a + b keeps what it loses in rounding: of large parameters, that changes a softmax.
BLLKERN_INLINE float exponential_of_sum(float a, float b, float highest) {
    float both = a + b;
    return exp_nonpositive((both - highest) + rounding_of_sum(a, b, both)).value;
}

// A is the logsumexp of a group.  Three passes over it: maxima, sums, gradients.  Each runs against the previous one's
// direction and keeps what the thread already holds, so a group of up to kHeld elements per thread is read once.
template <class T> __global__ void __launch_bounds__(kBlock, 1) grouped(const Problem<T> problem) {
    const Team team(problem.team);
    const int64_t item = (int64_t{blockIdx.x} * kBlock + threadIdx.x) / team.count;
    const int64_t group = item < problem.items ? problem.units : 0, first = item * problem.units;
    const int64_t step = kHeld * team.count;
    const float lowest = -__builtin_inff();
    float a[kHeld], b[kHeld];
    auto read = [&](int64_t done) {
        load(a, problem.a + first + done, group - done, team, problem.vectors, lowest);
        load(b, problem.b + first + done, group - done, team, problem.vectors, lowest);
    };

    float max_a = lowest, max_b = lowest, max_both = lowest;
    const int64_t last = group > 0 ? (group - 1) / step * step : 0;
    for (int64_t done = last; group > 0 && done >= 0; done -= step) {
        read(done);
#pragma unroll
        for (int j = 0; j < kHeld; j++) {
            max_a = max(max_a, a[j]), max_b = max(max_b, b[j]), max_both = max(max_both, a[j] + b[j]);
        }
    }
    max_a = combine<Larger>(max_a, team), max_b = combine<Larger>(max_b, team);
    max_both = combine<Larger>(max_both, team);

    float sum_a = 0, sum_b = 0, sum_both = 0;
    for (int64_t done = 0; done < group; done += step) {
        if (done > 0) read(done);
#pragma unroll
        for (int j = 0; j < kHeld; j++) {
            if (place<T>(team, problem.vectors, j) >= group - done) continue;
            sum_a += exp_nonpositive(a[j] - max_a).value;
            sum_b += exp_nonpositive(b[j] - max_b).value;
            sum_both += exponential_of_sum(a[j], b[j], max_both);
        }
    }
    sum_a = combine<Add>(sum_a, team), sum_b = combine<Add>(sum_b, team), sum_both = combine<Add>(sum_both, team);

    const float scale_a = problem.scale / sum_a, scale_b = problem.scale / sum_b, scale_both = problem.scale / sum_both;
    for (int64_t done = last; group > 0 && done >= 0 && (problem.grad_a || problem.grad_b); done -= step) {
        if (done < last) read(done);
#pragma unroll
        for (int j = 0; j < kHeld; j++) {
            float both = exponential_of_sum(a[j], b[j], max_both) * scale_both;
            a[j] = exp_nonpositive(a[j] - max_a).value * scale_a - both;
            b[j] = exp_nonpositive(b[j] - max_b).value * scale_b - both;
        }
        if (problem.grad_a) store(problem.grad_a + first + done, a, group - done, team, problem.vectors);
        if (problem.grad_b) store(problem.grad_b + first + done, b, group - done, team, problem.vectors);
    }
    bool counts = group > 0 && team.lane == 0;
    float highest = max_a + max_b;
    float loss = (highest - max_both) + rounding_of_sum(max_a, max_b, highest) + log(sum_a * sum_b / sum_both);
    keep(problem, team, item, counts ? loss : 0.f);
}

// loss[r] = scale * (partials[r, 0] + ... + partials[r, n - 1]), one team for each result
__global__ void __launch_bounds__(kBlock) add_partials(const float* __restrict__ partials, float* __restrict__ loss,
                                                       int64_t results, int64_t n, int team_count, float scale) {
    const Team team(team_count);
    const int64_t r = (int64_t{blockIdx.x} * kBlock + threadIdx.x) / team.count;
    double total = 0;
#pragma unroll 4
    for (int64_t i = team.lane; r < results && i < n; i += team.count) total += partials[r * n + i];
    total = combine<Add>(total, team);
    if (team.lane == 0 && r < results) loss[r] = static_cast<float>(total * scale);
}

// How a job is cut into items.
struct Plan {
    int64_t units, parameters, part, items_per_row, items;
    int team;
    int64_t blocks, partials;
    bool second;  // whether partials are still to be added up

    explicit Plan(const AgreementJob& job) {
        bool grouped = job.family == Family::categorical;
        int64_t per_unit = grouped ? job.group : job.family == Family::gaussian_learned ? 2 : 1;
        bool one_row = !job.per_row && per_unit == 1 && !grouped;
        int64_t rows = one_row ? 1 : job.rows, units_per_row = one_row ? job.rows * job.width : job.width / per_unit;
        units = grouped ? job.group : units_per_row;
        parameters = job.rows * job.width;
        part = grouped || units < kPart ? units : kPart;
        items_per_row = grouped ? units_per_row : (units + part - 1) / part;
        items = rows * items_per_row;
        team = team_size(part);
        blocks = (items * team + kBlock - 1) / kBlock;
        partials = job.per_row ? items : blocks;
        second = !job.per_row || items_per_row > 1;
    }

    // Whether every item starts at a multiple of n elements; parts do, as kPart is one.
    bool aligned_items(int64_t n) const { return units % n == 0 || parameters == units; }
};

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class T> void launch(const AgreementJob& job, const Plan& plan, float* partials, cudaStream_t stream) {
    bool vectors = aligned(job.a) && aligned(job.b) && aligned(job.grad_a) && aligned(job.grad_b) &&
                   plan.aligned_items(Packed<T>::kCount);
    Problem<T> problem = {
        static_cast<const T*>(job.a), static_cast<const T*>(job.b),
        static_cast<T*>(job.grad_a), static_cast<T*>(job.grad_b),
        plan.second ? partials : job.loss,
        plan.items, plan.items_per_row, plan.units, plan.part, plan.team, job.scale, vectors, job.per_row};
    unsigned blocks = static_cast<unsigned>(plan.blocks);
    switch (job.family) {
        case Family::bernoulli: separate<Bernoulli><<<blocks, kBlock, 0, stream>>>(problem); break;
        case Family::categorical: grouped<<<blocks, kBlock, 0, stream>>>(problem); break;
        case Family::gaussian: separate<Gaussian><<<blocks, kBlock, 0, stream>>>(problem); break;
        case Family::gaussian_learned: separate<GaussianLearned><<<blocks, kBlock, 0, stream>>>(problem); break;
        case Family::poisson: separate<Poisson><<<blocks, kBlock, 0, stream>>>(problem); break;
    }
}

const char* failure(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace
}  // namespace bllkern::device

namespace bllkern {

int64_t agreement_cuda_partials(const AgreementJob& job) {
    if (job.rows == 0 || job.width == 0) return 0;
    device::Plan plan(job);
    return plan.second ? plan.partials : 0;
}

const char* agreement_cuda(const AgreementJob& job, float* partials, void* stream_address) {
    using namespace device;
    cudaStream_t stream = static_cast<cudaStream_t>(stream_address);
    int64_t results = job.per_row ? job.rows : 1;
    if (job.rows == 0 || job.width == 0) return failure(cudaMemsetAsync(job.loss, 0, results * sizeof(float), stream));
    Plan plan(job);
    if (plan.blocks > INT32_MAX) return "too many elements for one launch";
    switch (job.dtype) {
        case DType::float32: launch<float>(job, plan, partials, stream); break;
        case DType::bfloat16: launch<__nv_bfloat16>(job, plan, partials, stream); break;
        case DType::float16: launch<__half>(job, plan, partials, stream); break;
    }
    if (plan.second) {
        int64_t each = plan.partials / results;
        int team = results == 1 ? kBlock : team_size(each);
        unsigned blocks = static_cast<unsigned>((results * team + kBlock - 1) / kBlock);
        add_partials<<<blocks, kBlock, 0, stream>>>(partials, job.loss, results, each, team, job.scale);
    }
    return failure(cudaGetLastError());
}

}  // namespace bllkern
