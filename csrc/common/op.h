// op.h - between torch and a kernel's launch: checks of the arguments, the device and its stream, the table
// of kernels. Everything here is LibTorch's stable ABI, so one binary serves every torch from 2.10 on.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cctype>
#include <climits>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/device.h"
#include "common/rows.h"
#include "common/table.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Only torch's CUDA builds have it: there libtorch.so brings it, elsewhere its address is null and nothing
// calls it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

// While it lives, the tensor's GPU is the current one; `stream` is torch's current stream there.
class DeviceScope {
    std::optional<torch::stable::accelerator::DeviceGuard> guard_;

  public:
    cudaStream_t stream = nullptr;

    explicit DeviceScope(const Tensor& tensor) {
        if (!tensor.is_cuda()) return;  // the CPU tensors of an emulated kernel
        guard_.emplace(tensor.get_device_index());
        void* current = nullptr;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
        stream = static_cast<cudaStream_t>(current);
    }
};

// The checks of one op's arguments. Dimensions have names: a name stands for the size that it first meets, and
// must meet the same size from then on. Whatever is wrong becomes a ValueError in Python.
class Arguments {
    struct Dimension {
        std::string name;
        int64_t size;
        const char* tensor;  // where it was met first
    };

    const char* op_;
    const Tensor* first_ = nullptr;
    const char* first_name_ = nullptr;
    std::optional<std::vector<int64_t>> leading_;  // what "..." stands for
    std::vector<Dimension> dimensions_;

    static std::string device(const Tensor& t) {
        return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "another device";
    }

    static const char* dtype(ScalarType type) {
        switch (type) {
            case ScalarType::Bool:
                return "bool";
            case ScalarType::Int:
                return "int32";
            case ScalarType::Long:
                return "int64";
            case ScalarType::Float:
                return "float32";
            default:
                return "another dtype";
        }
    }

    static std::string shape(const Tensor& t) {
        std::string text;
        for (const int64_t size : t.sizes()) text += (text.empty() ? "" : ", ") + std::to_string(size);
        return "[" + text + "]";
    }

    const Dimension* find(const std::string& name) const {
        for (const Dimension& d : dimensions_)
            if (d.name == name) return &d;
        return nullptr;
    }

  public:
    explicit Arguments(const char* op) : op_(op) {}

    template <class... Parts>
    [[noreturn]] void fail(const Parts&... message) const {
        std::ostringstream text;
        text << op_ << ": ";
        (text << ... << message);
        throw std::invalid_argument(text.str());
    }

    // Checks a tensor's shape, e.g. {"T", "D"}, or {"...", "D"} for any leading dimensions, the same in all tensors,
    // {"B+1"} for one more than B, {"2"} for a number; that its device is that of the op's first tensor, and its dtype
    // too, one of with_float_type's.
    void tensor(const char* name, const Tensor& t, std::initializer_list<const char*> shape_names) {
        if (!first_) {
            first_ = &t, first_name_ = name;
            with_float_type([](auto) {});
        }
        if (t.scalar_type() != first_->scalar_type()) fail(name, " must have the dtype of ", first_name_);
        tensor(name, t, t.scalar_type(), shape_names);
    }

    // The same for a tensor of a dtype of its own.
    void tensor(const char* name, const Tensor& t, ScalarType type, std::initializer_list<const char*> shape_names) {
        if (!first_) first_ = &t, first_name_ = name;
        if (t.is_cuda() != first_->is_cuda() || t.get_device_index() != first_->get_device_index())
            fail(name, " is on ", device(t), ", but ", first_name_, " is on ", device(*first_));
        if (t.scalar_type() != type) fail(name, " must have ", dtype(type), ", but has ", dtype(t.scalar_type()));

        const bool leading = std::strcmp(*shape_names.begin(), "...") == 0;
        const int64_t named = int64_t(shape_names.size()) - leading, skipped = t.dim() - named;
        const auto fail_shape = [&] {
            std::string expected;
            for (const char* n : shape_names) expected += (expected.empty() ? "" : ", ") + std::string(n);
            fail(name, " must have shape [", expected, "], but has ", shape(t));
        };
        if (leading ? skipped < 0 : skipped != 0) fail_shape();
        if (leading) {
            const std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().begin() + skipped);
            if (!leading_) leading_ = sizes;
            if (*leading_ != sizes)
                fail(name, " of shape ", shape(t), " has other leading dimensions than ", first_name_);
        }
        for (int64_t i = 0; i < named; ++i) {
            std::string dimension = shape_names.begin()[i + leading];
            int64_t size = t.size(skipped + i);
            if (std::isdigit(dimension[0])) {
                if (size != std::stoi(dimension)) fail_shape();
                continue;
            }
            if (const size_t plus = dimension.find('+'); plus != std::string::npos) {
                size -= std::stoi(dimension.substr(plus + 1));
                dimension.resize(plus);
            }
            const Dimension* met = find(dimension);
            if (!met)
                dimensions_.push_back({dimension, size, name});
            else if (met->size != size)
                fail(name, " of shape ", shape(t), " has ", dimension, " = ", size, ", but ", met->tensor, " has ",
                     dimension, " = ", met->size);
        }
    }

    // A contiguous tensor's data, e.g. of lengths or of a table.
    template <class T>
    const T* data(const char* name, const Tensor& t) const {
        if (!t.is_contiguous()) fail(name, " must be contiguous: call .contiguous() on it");
        return static_cast<const T*>(t.const_data_ptr());
    }
    // The same at a multiple of 16 bytes, for access in vectors.
    template <class T>
    const T* aligned_data(const char* name, const Tensor& t) const {
        if (reinterpret_cast<intptr_t>(t.const_data_ptr()) % 16 != 0)
            fail(name, " must start at a multiple of 16 bytes: call .clone() on it");
        return data<T>(name, t);
    }
    template <class T>
    T* mutable_data(const char* name, const Tensor& t) const {
        data<T>(name, t);
        return static_cast<T*>(t.mutable_data_ptr());  // which also ends what the tensor shares with a lazy clone
    }

    // The size of a dimension that a tensor was checked with.
    int64_t operator[](const char* dimension) const { return find(dimension)->size; }

    // Of a tensor [tokens, heads, size] checks that each head's row is contiguous and starts at a multiple of 16 bytes.
    void rows_of_heads(const char* name, const Tensor& t) const {
        if (t.numel() == 0) return;
        if (t.stride(2) != 1 && t.size(2) != 1) fail(name, " must have contiguous rows: call .contiguous() on it");
        const int64_t size = t.element_size(), start = reinterpret_cast<intptr_t>(t.const_data_ptr());
        if (start % 16 != 0 || t.stride(0) * size % 16 != 0 || t.stride(1) * size % 16 != 0)
            fail(name, " must have every row at a multiple of 16 bytes: call .clone() on it");
    }

    // The tensor's rows, each of which starts at a multiple of 16 bytes, for access in vectors.
    Rows rows(const char* name, const Tensor& t) const {
        const int64_t last = t.dim() - 1;
        if (t.numel() / std::max<int64_t>(t.size(last), 1) > INT_MAX) fail(name, " has more than 2^31 - 1 rows");
        Rows rows;
        bool regular = t.stride(last) == 1 || t.size(last) == 1, grouped = false;
        for (int64_t i = last - 1; i >= 0; --i) {
            const int64_t size = t.size(i), stride = t.stride(i);
            if (size == 1) continue;
            if (rows.count == 1) rows.stride = stride;
            if (!grouped && stride == rows.count * rows.stride) {
                rows.group *= size;
            } else if (!grouped) {
                grouped = true;
                rows.group_stride = stride;
            } else if (stride != rows.count / rows.group * rows.group_stride) {
                regular = false;
            }
            rows.count *= size;
        }
        if (t.numel() == 0) return {0};
        if (!regular)
            fail(name, " must be contiguous, or have contiguous rows in equal groups: call .contiguous() on it");
        const int64_t size = t.element_size(), start = reinterpret_cast<intptr_t>(t.const_data_ptr());
        if (start % 16 != 0 || rows.stride * size % 16 != 0 || rows.group_stride * size % 16 != 0)
            fail(name, " must have every row at a multiple of 16 bytes: call .clone() on it");
        return rows;
    }

    // Calls f with a value of the first tensor's element type: float, __half or __nv_bfloat16.
    template <class F>
    void with_float_type(F f) const {
        switch (first_->scalar_type()) {
            case ScalarType::Float:
                return f(float{});
            case ScalarType::Half:
                return f(__half{});
            case ScalarType::BFloat16:
                return f(__nv_bfloat16{});
            default:
                fail(first_name_, " must be float32, float16 or bfloat16");
        }
    }
};

// What counts the blocks that are done: the caller's `counters`, int32 zeros that are zeros again at the end, or, where
// there are none, zeros made here. The caller's spare a launch, before which a kernel could not begin early.
struct Counters {
    std::optional<Tensor> own;
    unsigned* data;

    Counters(const Arguments& arguments, const std::optional<Tensor>& given, const Tensor& like, int64_t needed) {
        if (given) arguments.data<int>("counters", *given);
        if (given && given->numel() < needed)
            arguments.fail("counters has ", given->numel(), " elements, but must have at least ", needed);
        if (!given) own = torch::stable::new_zeros(like, {needed}, ScalarType::Int);
        data = static_cast<unsigned*>((given ? *given : *own).mutable_data_ptr());
    }
};
