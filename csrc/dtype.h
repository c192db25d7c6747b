#pragma once

namespace bllkern {

enum class DType { float32, bfloat16, float16 };  // bllkern/_native.py numbers them alike

}  // namespace bllkern
