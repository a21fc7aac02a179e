// table.h - the kernels of this library, entered by their own files at load, registered with torch at run time.
#pragma once

#include <torch/csrc/stable/library.h>

#include <vector>

struct KernelEntry {
    const char* op;  // the op's name in torch.ops.pyllama
    void (*function)(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs);
};

inline std::vector<KernelEntry>& kernel_table() {
    static std::vector<KernelEntry> table;
    return table;
}

// The last line of a kernel's file: PYLLAMA_KERNEL(op, function), where function takes and returns what the op's schema
// says, in LibTorch's stable types.
#define PYLLAMA_KERNEL(op, ...) \
    static const bool entered_##op = (kernel_table().push_back({#op, TORCH_BOX(&__VA_ARGS__)}), true)
