#pragma once

#include <cstdint>

namespace bllkern {

// Asks for huge pages under [p, p + bytes), memory that is about to be written for the first time.  A page fault then
// brings in 2 MiB instead of 4 KiB; without it, faults cost several times what the kernels themselves do.
void prefer_huge_pages(void* p, int64_t bytes);

}  // namespace bllkern
