#include "prototypes.h"

#include "direction.h"
#include "elementary.h"
#include "threads.h"

// The rows are ordered by class (a counting sort) and cut into segments of at most kSegment rows of one class.  Each
// segment is summed by one thread; the sums of a class with several segments are then added in order.  So no thread waits
// for a large class, and results do not depend on the number of threads.
namespace bllkern::BLLKERN_ISA {
namespace {

constexpr int64_t kSegment = 32;   // rows
constexpr int64_t kPiece = 16384;  // elements that a thread takes at a time
constexpr int kBlock = 4;          // vectors of a row that are summed in registers

struct Segments {
    Scratch<int64_t> order;  // [counted rows], by class, within a class as they came
    Scratch<int64_t> begin;  // [count + 1], the first place of each segment in `order`
    Scratch<int64_t> label;  // [count]
    Scratch<int64_t> first;  // [classes + 1], the first segment of each class
    int64_t count = 0;

    explicit Segments(const PrototypesJob& job)
        : order(job.rows), begin(job.rows + 1), label(job.rows), first(job.classes + 1) {
        int64_t* counts = job.counts;
        memset(counts, 0, job.classes * sizeof *counts);
        for (int64_t r = 0; r < job.rows; r++)
            if (job.labels[r] != job.ignore_index) counts[job.labels[r]]++;
        Scratch<int64_t> next(job.classes);
        int64_t place = 0;
        for (int64_t c = 0; c < job.classes; c++) {
            first[c] = count, next[c] = place;
            for (int64_t left = counts[c]; left > 0; left -= kSegment) {
                label[count] = c, begin[count++] = place;
                place += left < kSegment ? left : kSegment;
            }
        }
        first[job.classes] = count, begin[count] = place;
        for (int64_t r = 0; r < job.rows; r++)
            if (job.labels[r] != job.ignore_index) order[next[job.labels[r]]++] = r;
    }
};

// Sum of the directions of `count` <= kSegment rows of x, times `scale`.
template <class T>
void sum_directions(const T* x, const int64_t* rows, int64_t count, int64_t width, float scale, float* out) {
    Direction directions[kSegment];
    for (int64_t k = 0; k < count; k++) directions[k] = Direction::of(x + rows[k] * width, width);
    int64_t i = 0;
    for (; i + kBlock * kLanes <= width; i += kBlock * kLanes) {
        Lanes total[kBlock] = {};
        for (int64_t k = 0; k < count; k++)
            for (int b = 0; b < kBlock; b++)
                total[b] += (load(x + rows[k] * width + i + b * kLanes) - directions[k].mean) * directions[k].reciprocal;
        for (int b = 0; b < kBlock; b++) store(out + i + b * kLanes, total[b] * scale);
    }
    each_vector(i, width, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
        Lanes total = {};
        for (int64_t k = 0; k < count; k++)
            total += (load_first(x + rows[k] * width + j, n, 0.f) - directions[k].mean) * directions[k].reciprocal;
        store_first(out + j, total * scale, n);
    });
}

template <class T> void run(const PrototypesJob& job) {
    Segments segments(job);
    Scratch<float> sums(segments.count * job.width);  // of the classes with several segments
    auto is_whole = [&](int64_t c) { return segments.first[c + 1] - segments.first[c] == 1; };

    auto sum_segment = [&](int64_t s) {
        int64_t c = segments.label[s], begin = segments.begin[s], count = segments.begin[s + 1] - begin;
        float* out = is_whole(c) ? job.prototypes + c * job.width : sums.data + s * job.width;
        float scale = is_whole(c) ? 1.f / static_cast<float>(count) : 1.f;
        sum_directions(static_cast<const T*>(job.x), segments.order.data + begin, count, job.width, scale, out);
    };
    parallel_for(segments.count, kPiece / (job.width * kSegment) + 1, sum_segment);

    auto finish_class = [&](int64_t c) {
        if (is_whole(c)) return;
        float* out = job.prototypes + c * job.width;
        float share = 1.f / static_cast<float>(job.counts[c] ? job.counts[c] : 1);
        each_vector(0, job.width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
            Lanes total = {};
            for (int64_t s = segments.first[c]; s < segments.first[c + 1]; s++)
                total += load_first(sums.data + s * job.width + i, n, 0.f);
            store_first(out + i, total * share, n);
        });
    };
    parallel_for(job.classes, kPiece / job.width + 1, finish_class);
}

}  // namespace

void prototypes(const PrototypesJob& job) {
    if (job.width) {
        with_type(job.dtype, [&](auto type) { run<decltype(type)>(job); });
    } else {
        Segments counted(job);
    }
}

}  // namespace bllkern::BLLKERN_ISA
