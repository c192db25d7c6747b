#include "evidence_cross_entropy.h"

#include "evidence_gradients.h"
#include "evidence_score.h"
#include "evidence_softmax.h"
#include "threads.h"

// Pass one makes the log evidences, the softmax error of each row replaces them, and pass two makes the gradients.
namespace bllkern::BLLKERN_ISA {
namespace {

constexpr int64_t kPiece = 1 << 16;  // elements of rows x classes x units worth handing to a thread

// Pieces of work, of `elements` each, that a thread takes at a time: about kPiece elements; the 1 is for no elements.
int64_t grain(int64_t elements) { return elements < kPiece ? kPiece / (elements + 1) + 1 : 1; }

// ---- the softmax error ----

// The error of rows n to n + kLanes divided by the sums of the large group g, and its sum times those less 1.
template <class T> void divide_error(const Inputs<T>& in, int64_t g, int64_t n) {
    Lanes zero = splat<Lanes>(0.f), over_classes = zero;
    for (int64_t c = 0; c < in.job.classes; c++) {
        int64_t at = (g * in.job.classes + c) * in.work.rows + n;
        Lanes total = load(in.work.errors + at), e = load(in.work.error + c * in.work.rows + n);
        Lanes q = select(total > 0.f, divide(e, total), zero);
        store(in.work.errors + at, q);
        if (!in.work.wide[g * in.job.classes + c]) over_classes += q * load(in.work.differences + at);
    }
    store(in.work.over_classes + g * in.work.rows + n, over_classes);
}

template <class T> void take_softmax(const Inputs<T>& in) {
    const EvidenceJob& job = in.job;
    const EvidenceWorkspace& work = in.work;

    auto rows = [&](int64_t i) {
        int64_t n = i * kLanes;
        SoftmaxTarget target(job.labels ? job.labels + n : nullptr,
                             job.labels ? nullptr : job.probabilities + n * job.classes, job.classes, job.ignore_index,
                             job.smoothing, in.lanes(n), job.scale);
        store(work.row_loss + n, softmax_error(work.error + n, work.rest + n, work.rows, job.classes, target));
        for (int64_t g = 0; g < work.large; g++) divide_error(in, g, n);
    };
    parallel_for(ceil_div(job.rows, kLanes), grain(job.classes * kLanes * (4 + work.large)), rows);

    auto classes = [&](int64_t c) {
        work.over_rows[c] = static_cast<float>(sum(work.error + c * work.rows, job.rows));
    };
    parallel_for(job.classes, grain(job.rows), classes);
    *job.loss = static_cast<float>(sum(work.row_loss, job.rows) * job.scale);
}

// ---- all of it ----

template <class F, class T> void run(const EvidenceJob& job, const EvidenceWorkspace& work) {
    Inputs<T> in(job, work);
    auto prepare = [&](int64_t i) { prepare_large(in, i * kLanes); };
    if (work.large) parallel_for(ceil_div(job.rows, kLanes), grain(kLanes * job.width), prepare);
    auto average = [&](int64_t i) { average_messages(in, i * kLanes); };
    if (F::kRelative) parallel_for(ceil_div(job.width, kLanes), grain(kLanes * job.classes), average);
    Score<F, T> score(in);
    parallel_for(score.blocks(), grain(score.elements()), score);
    take_softmax(in);
    if (job.grad_log_prior)
        for (int64_t c = 0; c < job.classes; c++)
            store_first(static_cast<T*>(job.grad_log_prior) + c, splat<Lanes>(work.over_rows[c]), 1);
    if (!job.grad_a && !job.grad_messages) return;
    Gradients<F, T> gradients(in);
    parallel_for(gradients.blocks(), grain(gradients.elements()), gradients);
}

template <class T> void run_typed(const EvidenceJob& job, const EvidenceWorkspace& work) {
    switch (job.family) {
        case Family::bernoulli: return run<BernoulliEvidence, T>(job, work);
        case Family::gaussian: return run<GaussianEvidence, T>(job, work);
        case Family::gaussian_learned: return run<GaussianLearnedEvidence, T>(job, work);
        case Family::poisson: return run<PoissonEvidence, T>(job, work);
        case Family::categorical:
            return work.large ? run<LargeGroupEvidence, T>(job, work) : run<CategoricalEvidence, T>(job, work);
    }
}

}  // namespace

void evidence_cross_entropy(const EvidenceJob& job) {
    EvidenceWorkspace work(job, job.workspace);
    with_type(job.dtype, [&](auto type) { run_typed<decltype(type)>(job, work); });
}

}  // namespace bllkern::BLLKERN_ISA
