// module.cpp - the Python module pyllama._C: what this build holds, and switching its kernels on and off.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "common/table.h"

namespace py = pybind11;
using torch::stable::detail::StableLibrary;

namespace {

#ifdef PYLLAMA_CUDA_VERSION
constexpr const char* cuda_version = PYLLAMA_CUDA_VERSION;
const std::vector<std::string> architectures{PYLLAMA_ARCHITECTURES};
#else
constexpr const char* cuda_version = nullptr;
const std::vector<std::string> architectures;
#endif

// While its library lives, a key's kernels are registered with torch's dispatcher.
std::map<std::string, std::unique_ptr<StableLibrary>>& libraries() {
    static std::map<std::string, std::unique_ptr<StableLibrary>> libraries;
    return libraries;
}

void check_key(const std::string& key) {
    if (key != "CUDA" && key != "CPU") throw py::value_error("key is \"" + key + "\", but must be \"CUDA\" or \"CPU\"");
}

void enable(const std::string& key) {
    check_key(key);
    if (libraries().count(key)) return;
    auto library = std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL, "pyllama", key.c_str(), __FILE__, __LINE__);
    for (const KernelEntry& kernel : kernel_table()) library->impl(kernel.op, kernel.function);
    libraries()[key] = std::move(library);
}

void disable(const std::string& key) {
    check_key(key);
    libraries().erase(key);
}

py::tuple enabled() {
    py::list keys;
    for (const auto& entry : libraries()) keys.append(entry.first);
    return py::tuple(keys);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    std::vector<std::string> ops;
    for (const KernelEntry& kernel : kernel_table()) ops.push_back(kernel.op);
    std::sort(ops.begin(), ops.end());

    m.attr("version") = PYLLAMA_VERSION;
    m.attr("cuda_version") = cuda_version ? py::object(py::str(cuda_version)) : py::none();
    m.attr("architectures") = py::tuple(py::cast(architectures));
    m.attr("ops") = py::tuple(py::cast(ops));
    m.def("enable", &enable, py::arg("key"));
    m.def("disable", &disable, py::arg("key"));
    m.def("enabled", &enabled);
}
