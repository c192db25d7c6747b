// Where the memory of a tensor begins: how kernels are called from Python.  This module is not linked to torch.
#pragma once

#include <pybind11/pybind11.h>

namespace bllkern {

// Of a contiguous tensor, checked by the caller, who keeps it alive; null for None.
struct Address {
    void* at = nullptr;

    template <class T> operator T*() const { return static_cast<T*>(at); }
    // Whether the tensor is there.
    explicit operator bool() const { return at != nullptr; }
};

}  // namespace bllkern

namespace pybind11::detail {

template <> struct type_caster<bllkern::Address> {
    PYBIND11_TYPE_CASTER(bllkern::Address, const_name("torch.Tensor | None"));

    bool load(handle tensor, bool) {
        static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
        if (tensor.is_none()) return true;
        const object address = reinterpret_steal<object>(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr));
        if (!address) throw error_already_set();
        value.at = PyLong_AsVoidPtr(address.ptr());
        return !PyErr_Occurred();
    }
};

}  // namespace pybind11::detail
