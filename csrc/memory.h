#pragma once

#include <cstdint>

namespace bllkern {

// Asks for huge pages under [p, p + bytes), memory that is about to be written for the first time.  A page fault then
// brings in 2 MiB instead of 4 KiB; without it, faults cost several times what the kernels themselves do.
void prefer_huge_pages(void* p, int64_t bytes);

// Lets glibc keep the memory that is freed for the process' next allocations.  It would give back the end of its heap
// whenever a block frees its activations, and all that is larger than 32 MB, and fault it in again in every step.  Does
// nothing where the environment says how malloc is to behave, and for other libraries.
void keep_freed_memory();

}  // namespace bllkern
