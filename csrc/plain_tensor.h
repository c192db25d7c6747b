// Torch tensors read through their Python attributes: this module is not linked to torch.
#pragma once

#include <pybind11/pybind11.h>

#include "dtype.h"

namespace bllkern {

// What is compared by identity, kept as long as the process runs.
struct Torch {
    PyObject *tensor, *parameter, *int64, *floats[3];  // floats in the order of DType

    static const Torch& get() {
        static const Torch torch;
        return torch;
    }

  private:
    Torch() {
        auto torch = pybind11::module_::import("torch");
        auto member = [&](const char* name) { return torch.attr(name).cast<pybind11::object>().release().ptr(); };
        tensor = member("Tensor"), int64 = member("int64");
        parameter = torch.attr("nn").attr("Parameter").cast<pybind11::object>().release().ptr();
        floats[0] = member("float32"), floats[1] = member("bfloat16"), floats[2] = member("float16");
    }
};

// A contiguous tensor or parameter on the CPU with one or two dimensions; `data` is null of anything else.
struct PlainTensor {
    const void* data = nullptr;
    PyObject* dtype = nullptr;  // borrowed: torch keeps it
    int64_t dims = 0, sizes[2] = {1, 1};

    explicit PlainTensor(pybind11::handle x) {
        const Torch& torch = Torch::get();
        PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(x.ptr()));
        if (type != torch.tensor && type != torch.parameter) return;
        static PyObject *const shape_name = name("shape"), *const dtype_name = name("dtype"),
                        *const cpu_name = name("is_cpu"), *const contiguous_name = name("is_contiguous"),
                        *const data_name = name("data_ptr");
        auto attribute = [&](PyObject* of) { return own(PyObject_GetAttr(x.ptr(), of)); };
        auto result = [&](PyObject* of) { return own(PyObject_CallMethodNoArgs(x.ptr(), of)); };
        try {
            pybind11::object shape = attribute(shape_name);
            dims = PyTuple_GET_SIZE(shape.ptr());
            if (dims < 1 || dims > 2) return;
            if (attribute(cpu_name).ptr() != Py_True || result(contiguous_name).ptr() != Py_True) return;
            for (int64_t i = 0; i < dims; i++) sizes[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
            dtype = attribute(dtype_name).ptr();
            data = reinterpret_cast<const void*>(PyLong_AsLongLong(result(data_name).ptr()));
        } catch (const pybind11::error_already_set&) {  // a tensor without memory, in one of torch's transforms
            data = nullptr;
        }
    }

    // The index of its dtype in DType, or -1.
    int float_type() const {
        for (int i = 0; i < 3; i++)
            if (dtype == Torch::get().floats[i]) return i;
        return -1;
    }

  private:
    static PyObject* name(const char* text) { return PyUnicode_InternFromString(text); }
    static pybind11::object own(PyObject* x) {
        if (!x) throw pybind11::error_already_set();
        return pybind11::reinterpret_steal<pybind11::object>(x);
    }
};

}  // namespace bllkern
