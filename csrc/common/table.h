// table.h - the kernels of this library: entered by their own files at load, registered with torch at run
// time.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

struct KernelEntry {
    const char* op;   // the op's name in torch.ops.pyllama
    const char* key;  // the dispatch key of the tensors that it runs on
    void (*function)(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs);
};

inline std::vector<KernelEntry>& kernel_table() {
    static std::vector<KernelEntry> table;
    return table;
}

// The last line of a kernel's file: enters the function of the op's own name, which takes and returns what
// the op's schema says, in LibTorch's stable types.
#define PYLLAMA_KERNEL(op)                            \
    [[maybe_unused]] static const bool entered_##op = \
        (kernel_table().push_back({#op, kernel_key, TORCH_BOX(&op)}), true)
