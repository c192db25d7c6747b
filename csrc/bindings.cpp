// The module bllkern._C: kernels called with tensors, of which they take the address.  bllkern/_native/ is its only caller
// and checks every argument.
#include <pybind11/pybind11.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "address.h"
#include "agreement.h"
#include "batch_norm_relu.h"
#include "evidence_cross_entropy.h"
#include "gram.h"
#include "hidden_layer.h"
#include "isa.h"
#include "linear_cross_entropy.h"
#include "linear_head.h"
#include "memory.h"
#include "pack.h"
#include "normalize.h"
#include "plain_tensor.h"
#include "prototypes.h"
#include "spatial_mean.h"

namespace py = pybind11;
using namespace bllkern;

namespace {

constexpr int64_t kSmallHead = int64_t{1} << 20;  // rows * width * classes up to which Python's checks take long beside it
constexpr int64_t kLongCall = int64_t{1} << 15;  // elements from which on giving up the interpreter lock is cheap

py::tuple supported_isas() {
    py::list names;
    for (Isa isa : kIsas)
        if (isa_supported(isa)) names.append(kIsaNames[static_cast<int>(isa)]);
    return py::tuple(names);
}

void set_isa_by_name(const std::string& name) {
    for (Isa isa : kIsas)
        if (name == kIsaNames[static_cast<int>(isa)] && isa_supported(isa)) return set_isa(isa);
    throw std::invalid_argument("isa must be one of " + py::repr(supported_isas()).cast<std::string>() +
                                " on this machine, got '" + name + "'");
}

#if BLLKERN_CUDA_BUILT
void check(const char* op, const char* failure) {
    if (failure) throw std::runtime_error(std::string("CUDA kernel of ") + op + ": " + failure);
}
#endif

// A function of call(job, extra...) with the members of the job as its first arguments.
template <class... Extra, class Call> auto with_agreement_job(Call call) {
    return [call](Address a, Address b, Address grad_a, Address grad_b, Address loss, int64_t rows, int64_t width,
                  int64_t group, int family, int dtype, bool per_row, float scale, Extra... extra) {
        AgreementJob job = {a, b, grad_a, grad_b,
                            loss, rows, width, group,
                            static_cast<Family>(family), static_cast<DType>(dtype), per_row, scale};
        return call(job, extra...);
    };
}

template <class Call> auto without_lock_if_long(int64_t elements, Call call) {
    if (elements < kLongCall) return call();
    py::gil_scoped_release release;
    return call();
}

// How many of the labels are not ignore_index.  The kernels index by labels, and compiled graphs do not check them.
int64_t count_labels(Address labels, int64_t rows, int64_t classes, int64_t ignore_index) {
    const int64_t* label = labels;
    int64_t counted = 0;
    for (int64_t i = 0; i < rows; i++) {
        if (label[i] == ignore_index) continue;
        if (label[i] < 0 || label[i] >= classes)
            throw py::value_error("target must hold class indices from 0 to " + std::to_string(classes - 1) +
                                  " (or ignore_index " + std::to_string(ignore_index) + "), got " +
                                  std::to_string(label[i]));
        counted++;
    }
    return counted;
}

// What the loss of each row that counts is multiplied by.
float row_scale(Address labels, int64_t rows, int64_t classes, int64_t ignore_index, bool mean) {
    const int64_t counted = labels ? count_labels(labels, rows, classes, ignore_index) : rows;
    return mean && counted ? 1.f / static_cast<float>(counted) : 1.f;
}

// Floats of workspace that evidence_cross_entropy needs.
int64_t evidence_workspace(int64_t rows, int64_t classes, int64_t width, int64_t group, int family) {
    EvidenceJob job = {};
    job.rows = rows, job.classes = classes, job.width = width, job.group = group;
    job.family = static_cast<Family>(family);
    return EvidenceWorkspace(job, nullptr).size;
}

void evidence_cross_entropy_at(Address a, Address messages, Address log_prior, Address labels, Address probabilities,
                               Address grad_a, Address grad_messages, Address grad_log_prior, Address loss,
                               Address workspace, int64_t rows, int64_t classes, int64_t width, int64_t group,
                               int64_t ignore_index, float smoothing, int family, int dtype, bool mean) {
    const float scale = row_scale(labels, rows, classes, ignore_index, mean);
    EvidenceJob job = {a, messages, log_prior,
                       labels, probabilities, grad_a,
                       grad_messages, grad_log_prior, loss,
                       workspace, rows, classes, width, group, ignore_index, smoothing,
                       static_cast<Family>(family), static_cast<DType>(dtype), scale};
    std::unique_ptr<float[]> own;
    if (!workspace) {
        own.reset(new float[EvidenceWorkspace(job, nullptr).size]);
        job.workspace = own.get();
    }
    without_lock_if_long(rows * classes * width, [&] { BLLKERN_DISPATCH(evidence_cross_entropy)(job); });
}

double softmax_errors_at(Address logits, Address bias, Address labels, Address probabilities, int64_t rows,
                         int64_t classes, int64_t ignore_index, float smoothing, float scale, int dtype, bool write) {
    SoftmaxErrorJob job = {logits, bias, labels,
                           probabilities, rows, classes, ignore_index, smoothing, scale,
                           static_cast<DType>(dtype), write};
    return without_lock_if_long(rows * classes, [&] { return BLLKERN_DISPATCH(softmax_errors)(job); });
}

double linear_head_at(Address x, Address weight, Address bias, Address labels, Address probabilities, Address grad_x,
                      Address grad_weight, Address grad_bias, int64_t rows, int64_t width, int64_t classes,
                      int64_t ignore_index, float smoothing, bool mean, int dtype) {
    const float scale = row_scale(labels, rows, classes, ignore_index, mean);
    LinearHeadJob job = {x, weight, bias,
                         labels, probabilities, grad_x,
                         grad_weight, grad_bias, rows, width, classes, ignore_index,
                         smoothing, scale, static_cast<DType>(dtype)};
    return without_lock_if_long(rows * width, [&] { return BLLKERN_DISPATCH(linear_head)(job); });
}

// The loss of a small head on labels, without gradients, where every argument is of the usual kind: one look at each is
// then enough, and takes a third of the time of the checks that could tell what is wrong.  None otherwise.
py::object small_head_loss(py::handle x, py::handle weight, py::handle bias, py::handle target, double smoothing,
                           const std::string& reduction, int64_t ignore_index) {
    const PlainTensor of_x(x), of_weight(weight), labels(target);
    if (!of_x.data || !of_weight.data || !labels.data || of_x.dims != 2 || of_weight.dims != 2 || labels.dims != 1)
        return py::none();
    const int64_t rows = of_x.sizes[0], width = of_x.sizes[1], classes = of_weight.sizes[0];
    const int dtype = of_x.float_type();
    const bool fits = dtype >= 0 && of_weight.dtype == of_x.dtype && of_weight.sizes[1] == width &&
                      labels.dtype == Torch::get().int64 && labels.sizes[0] == rows && smoothing >= 0 &&
                      smoothing <= 1 && (reduction == "mean" || reduction == "sum") &&
                      rows * width * classes < kSmallHead;
    if (!fits) return py::none();
    const void* offsets = nullptr;
    if (!bias.is_none()) {
        const PlainTensor of_bias(bias);
        offsets = of_bias.data;
        if (!offsets || of_bias.dims != 1 || of_bias.dtype != of_x.dtype || of_bias.sizes[0] != classes)
            return py::none();
    }
    auto address = [](const void* p) { return Address{const_cast<void*>(p)}; };
    return py::float_(linear_head_at(address(of_x.data), address(of_weight.data), address(offsets),
                                     address(labels.data), {}, {}, {}, {}, rows, width, classes, ignore_index, static_cast<float>(smoothing),
                                     reduction == "mean", dtype));
}

void hidden_layer_at(Address x, Address weight, Address y, Address out, Address r, int64_t rows, int64_t width,
                     int64_t units, float eps) {
    HiddenLayerJob job = {x, weight, y, out, r, rows, width, units, eps};
    without_lock_if_long(rows * width, [&] { BLLKERN_DISPATCH(hidden_layer)(job); });
}

void hidden_layer_gradient_at(Address x, Address weight, Address y, Address r, Address by_out, Address by_x,
                              Address by_weight, int64_t rows, int64_t width, int64_t units) {
    HiddenLayerGradientJob job = {x, weight, y, r, by_out, by_x, by_weight, rows, width, units};
    without_lock_if_long(rows * width, [&] { BLLKERN_DISPATCH(hidden_layer_gradient)(job); });
}

int64_t normalize_rows_at(Address x, Address labels, Address normalized, int64_t rows, int64_t width,
                          int64_t ignore_index, int dtype) {
    NormalizeJob job = {x, labels, normalized, rows, width,
                        ignore_index, static_cast<DType>(dtype)};
    return without_lock_if_long(rows * width, [&] { return BLLKERN_DISPATCH(normalize_rows)(job); });
}

void normalize_gradient_at(Address x, Address by_rows, Address by_classes, Address labels, Address counts,
                           Address grad_x, int64_t rows, int64_t width, int64_t ignore_index, float scale, int dtype) {
    NormalizeGradientJob job = {x, by_rows, by_classes,
                                labels, counts, grad_x,
                                rows, width, ignore_index, scale, static_cast<DType>(dtype)};
    without_lock_if_long(rows * width, [&] { BLLKERN_DISPATCH(normalize_gradient)(job); });
}

double gram_error_at(Address gram, Address labels, int64_t first, int64_t rows, int64_t columns, int64_t ignore_index,
                     bool without_diagonal) {
    GramErrorJob job = {gram, labels, first, rows, columns, ignore_index,
                        without_diagonal};
    return without_lock_if_long(rows * columns, [&] { return BLLKERN_DISPATCH(gram_error)(job); });
}

double gram_loss_at(Address x, Address labels, Address grad_x, int64_t rows, int64_t width, int64_t ignore_index,
                    bool without_diagonal, int dtype) {
    GramLossJob job = {x, labels, grad_x, rows, width, ignore_index, without_diagonal, static_cast<DType>(dtype)};
    return without_lock_if_long(rows * width, [&] { return BLLKERN_DISPATCH(gram_loss)(job); });
}

double sum_of_squares_at(Address x, int64_t count) {
    return without_lock_if_long(count, [&] { return BLLKERN_DISPATCH(sum_of_squares)(x, count); });
}

void prototypes_at(Address x, Address labels, Address prototypes, Address counts, int64_t rows, int64_t width,
                   int64_t classes, int64_t ignore_index, int dtype) {
    PrototypesJob job = {x, labels, prototypes,
                         counts, rows, width, classes, ignore_index, static_cast<DType>(dtype)};
    without_lock_if_long(rows * width, [&] { BLLKERN_DISPATCH(prototypes)(job); });
}

template <class Pass> auto with_pack_job(Pass pass) {
    return [pass](Address words, Address packed, int64_t count, int64_t word_bytes, int64_t bytes) {
        PackJob job = {words, packed, count, word_bytes, bytes};
        return without_lock_if_long(count, [&] { return pass(job); });
    };
}

template <class Pass> auto with_spatial_mean_job(Pass pass) {
    return [pass](Address x, Address mean, int64_t maps, int64_t places, int dtype) {
        SpatialMeanJob job = {x, mean, maps, places, static_cast<DType>(dtype)};
        without_lock_if_long(maps * places, [&] { pass(job); });
    };
}

// A function of one job, whose members are its arguments; of each pass some are 0.
template <class Pass> auto with_batch_norm_job(Pass pass) {
    return [pass](Address x, Address weight, Address bias, Address shortcut, Address mean, Address variance, Address z,
                  Address features, Address active, Address along, Address by_z, Address by_features, Address by_weight,
                  Address by_bias, Address grad_x, Address grad_shortcut, int64_t images, int64_t channels, int64_t height,
                  int64_t width, int64_t out_height, int64_t out_width, int64_t bins_down, int64_t bins_across, int window,
                  float eps, int dtype, bool channels_last) {
        BatchNormReluJob job = {x, weight, bias,
                                shortcut, mean, variance,
                                z, features, active, along,
                                by_z, by_features, by_weight,
                                by_bias, grad_x, grad_shortcut,
                                images, channels, height, width, out_height, out_width, bins_down, bins_across, window,
                                eps, static_cast<DType>(dtype), channels_last};
        without_lock_if_long(images * channels * height * width, [&] { pass(job); });
    };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    py::list families;
    for (const char* name : kFamilyNames) families.append(name);
    m.attr("families") = py::tuple(families);
    m.attr("compiler") = BLLKERN_COMPILER;
    m.attr("cuda_built") = BLLKERN_CUDA_BUILT != 0;
    m.attr("cuda_version") = BLLKERN_CUDA_VERSION;
    m.attr("cuda_architectures") = BLLKERN_CUDA_ARCHITECTURES;
    m.attr("isas") = supported_isas();
    m.def("isa", [] { return kIsaNames[static_cast<int>(current_isa())]; });
    m.def("set_isa", &set_isa_by_name);
    m.def("keep_freed_memory", &keep_freed_memory);
    m.def("prefer_huge_pages", [](Address x, int64_t bytes) { prefer_huge_pages(x, bytes); });

    m.def("agreement", with_agreement_job([](const AgreementJob& job) {
        without_lock_if_long(job.rows * job.width, [&] { BLLKERN_DISPATCH(agreement)(job); });
    }));
    m.def("batch_norm_relu", with_batch_norm_job([](const auto& job) { BLLKERN_DISPATCH(batch_norm_relu)(job); }));
    m.def("batch_norm_relu_gradient",
          with_batch_norm_job([](const auto& job) { BLLKERN_DISPATCH(batch_norm_relu_gradient)(job); }));
    m.def("evidence_workspace", &evidence_workspace);
    m.def("evidence_cross_entropy", &evidence_cross_entropy_at);
    m.def("count_labels", &count_labels);
    m.def("softmax_errors", &softmax_errors_at);
    m.def("linear_head", &linear_head_at);
    m.def("small_head_loss", &small_head_loss);
    m.def("hidden_layer", &hidden_layer_at);
    m.def("hidden_layer_gradient", &hidden_layer_gradient_at);
    m.def("normalize_rows", &normalize_rows_at);
    m.def("normalize_gradient", &normalize_gradient_at);
    m.def("gram_error", &gram_error_at);
    m.def("gram_loss", &gram_loss_at);
    m.def("sum_of_squares", &sum_of_squares_at);
    m.def("pack", with_pack_job([](const PackJob& job) { return BLLKERN_DISPATCH(pack)(job); }));
    m.def("unpack", with_pack_job([](const PackJob& job) { return BLLKERN_DISPATCH(unpack)(job); }));
    m.def("prototypes", &prototypes_at);
    m.def("spatial_mean", with_spatial_mean_job([](const auto& job) { BLLKERN_DISPATCH(spatial_mean)(job); }));
    m.def("spread_mean", with_spatial_mean_job([](const auto& job) { BLLKERN_DISPATCH(spread_mean)(job); }));
#if BLLKERN_CUDA_BUILT
    m.def("agreement_cuda_partials", with_agreement_job(&agreement_cuda_partials));
    m.def("agreement_cuda", with_agreement_job<Address, int64_t>([](const auto& job, Address partials, int64_t stream) {
        check("agreement", agreement_cuda(job, partials, reinterpret_cast<void*>(stream)));
    }));
#endif
}
