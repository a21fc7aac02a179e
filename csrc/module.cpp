// module.cpp - the Python module pyllama._C: what this build holds, and switching its kernels on and off.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cctype>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "common/table.h"

namespace py = pybind11;
using torch::stable::detail::StableLibrary;

void bind_reader(py::module_& m);  // reader.cpp

namespace {

#ifdef PYLLAMA_CUDA_VERSION
const std::optional<std::string> cuda_version = PYLLAMA_CUDA_VERSION;
constexpr const char* architecture_names = PYLLAMA_ARCHITECTURES;  // separated by spaces
#else
const std::optional<std::string> cuda_version;
constexpr const char* architecture_names = "";
#endif

std::vector<std::string> architectures() {
    std::istringstream names(architecture_names);
    return {std::istream_iterator<std::string>(names), {}};
}

// Machine code (sm_80) runs on its own capability and newer ones of the same major version; with a letter
// (sm_90a) on its own only; PTX (compute_80) is compiled by the driver for any newer GPU.
bool supports(int major, int minor) {
    for (const std::string& name : architectures()) {
        const size_t digits = name.find('_') + 1;
        const int number = std::stoi(name.substr(digits)), capability = major * 10 + minor;
        const bool exact = std::isalpha(name.back()), ptx = name[0] == 'c';
        if (exact ? capability == number : capability >= number && (ptx || major == number / 10)) return true;
    }
    return false;
}

std::vector<std::string> ops() {
    std::set<std::string> names;
    for (const KernelEntry& kernel : kernel_table()) names.insert(kernel.op);
    return {names.begin(), names.end()};
}

// While its library lives, a key's kernels are registered with torch's dispatcher.
std::map<std::string, std::unique_ptr<StableLibrary>>& libraries() {
    static std::map<std::string, std::unique_ptr<StableLibrary>> libraries;
    return libraries;
}

void enable(const std::string& key) {
    if (libraries().count(key)) return;
    std::unique_ptr<StableLibrary> library;
    for (const KernelEntry& kernel : kernel_table()) {
        if (key != kernel.key) continue;
        if (!library)
            library =
                std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL, "pyllama", kernel.key, __FILE__, __LINE__);
        library->impl(kernel.op, kernel.function);
    }
    if (!library) throw py::value_error("this build has no kernels for dispatch key " + key);
    libraries()[key] = std::move(library);
}

void disable(const std::string& key) { libraries().erase(key); }

std::vector<std::string> enabled() {
    std::vector<std::string> keys;
    for (const auto& entry : libraries()) keys.push_back(entry.first);
    return keys;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.attr("version") = PYLLAMA_VERSION;
    m.attr("cuda_version") = cuda_version;
    m.attr("architectures") = py::tuple(py::cast(architectures()));
    m.attr("ops") = py::tuple(py::cast(ops()));
    m.def("supports", &supports, py::arg("major"), py::arg("minor"));
    m.def("enable", &enable, py::arg("key"));
    m.def("disable", &disable, py::arg("key"));
    m.def("enabled", [] { return py::tuple(py::cast(enabled())); });
    bind_reader(m);
}
