// Bins along one side of a plane: the mean of the places of each, and what comes back from it to the places.
#pragma once

#include "rows.h"

namespace bllkern::BLLKERN_ISA {

// Bin p of P over H places has those from floor(p H / P) up to ceil((p + 1) H / P); so place i is in the bins from
// floor(i P / H) up to ceil((i + 1) P / H), more than one where P does not divide H.  Both ways are products with the
// matrix of which place is in which bin: a few vectors for a row, however narrow it is.
struct Bins {
    const int64_t places, count;
    Scratch<int64_t> begin, end;   // [count], places
    Scratch<int64_t> first, last;  // [places], bins; the last one is not among them
    Scratch<float> share;          // [count and more], 1 / places of the bin

    Bins(int64_t places, int64_t count)
        : places(places), count(count), begin(count), end(count), first(places), last(places), share(padded(count)),
          row_of_places(padded(places)), row_of_bins(padded(count)), of_places(places * row_of_bins),
          of_bins(count * row_of_places) {
        memset(share.data, 0, row_of_bins * sizeof(float));
        memset(of_places.data, 0, places * row_of_bins * sizeof(float));
        memset(of_bins.data, 0, count * row_of_places * sizeof(float));
        for (int64_t p = 0; p < count; p++) {
            begin[p] = p * places / count, end[p] = ((p + 1) * places + count - 1) / count;
            share[p] = 1.f / static_cast<float>(end[p] - begin[p]);
            for (int64_t i = begin[p]; i < end[p]; i++)
                of_places[i * row_of_bins + p] = of_bins[p * row_of_places + i] = 1;
        }
        for (int64_t i = 0; i < places; i++)
            first[i] = i * count / places, last[i] = ((i + 1) * count + places - 1) / places;
    }

    // 1 for each of the bins from p on that has the place, 0 for others and past the last.
    BLLKERN_MEMBER Lanes has(int64_t i, int64_t p) const { return load(of_places.data + i * row_of_bins + p); }

    // What the places get of `by_bins` [count], gradients by the means, times `factor`; whole vectors are written, of
    // zeros past the last place.
    void spread(const float* by_bins, float factor, float* out) const {
        for (int64_t i = 0; i < places; i += kLanes) {
            Lanes sum = {};
            for (int64_t p = 0; p < count; p++)
                sum += by_bins[p] * share[p] * load(of_bins.data + p * row_of_places + i);
            store(out + i, sum * factor);
        }
    }

  private:
    const int64_t row_of_places, row_of_bins;  // whole vectors of places, of bins
    Scratch<float> of_places, of_bins;         // 1 or 0: [places, row_of_bins], [count, row_of_places]
};

}  // namespace bllkern::BLLKERN_ISA
