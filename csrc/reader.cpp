// reader.cpp - what reads weights, as Python sees it: HostReader, and DeviceReader where the build has the CUDA
// runtime.
#include "reader.h"

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef PYLLAMA_CUDA_RUNTIME
#include "reader_cuda.h"
#endif

namespace py = pybind11;

namespace {

using Files = std::vector<std::pair<int, std::string>>;
// Index of the file, offset there, address of the place, rows, bytes of a row, pitch.
using Pieces = std::vector<std::tuple<size_t, int64_t, uintptr_t, int64_t, int64_t, int64_t>>;
using Progress = std::function<void(int64_t)>;

template <class Lane>
void read_with(std::vector<Lane>& lanes, int64_t chunk, const Files& named, const Pieces& given,
               const Progress& progress) {
    std::vector<File> files;
    for (const auto& [descriptor, name] : named) files.push_back({descriptor, name});
    std::vector<Piece> pieces;
    for (const auto& [file, offset, address, rows, row, pitch] : given) {
        if (file >= files.size() || offset < 0 || rows < 0 || row < 0 || (rows > 1 && pitch < row))
            throw py::value_error("a piece must be of one of the files, at an offset, in rows that do not overlap");
        pieces.push_back({file, offset, reinterpret_cast<char*>(address), rows, row, pitch});
    }
    try {
        const py::gil_scoped_release released;
        bring_all(files, cut(pieces, chunk), lanes, [&](int64_t bytes) {
            const py::gil_scoped_acquire acquired;
            if (PyErr_CheckSignals()) throw py::error_already_set();
            if (bytes) progress(bytes);
        });
    } catch (const ReadError& error) {  // an OSError with errno, strerror and filename
        PyErr_SetObject(PyExc_OSError, py::make_tuple(error.code, error.what(), error.file).ptr());
        throw py::error_already_set();
    }
}

void check_sizes(int threads, int64_t chunk) {
    if (threads < 1 || chunk < 1) throw py::value_error("a reader needs one thread and a chunk of one byte at least");
}

class HostReader {
    std::vector<HostLane> lanes_;
    int64_t chunk_;

  public:
    HostReader(int threads, int64_t chunk) : chunk_(chunk) {
        check_sizes(threads, chunk);
        lanes_.resize(threads);
    }
    void read(const Files& files, const Pieces& pieces, const Progress& progress) {
        read_with(lanes_, chunk_, files, pieces, progress);
    }
};

#ifdef PYLLAMA_CUDA_RUNTIME
class DeviceReader {
    int device_;
    cudaStream_t stream_;
    int64_t chunk_;
    std::unique_ptr<Event> ready_;
    std::vector<DeviceLane> lanes_;

  public:
    DeviceReader(int device, uintptr_t stream, int threads, int buffers, int64_t chunk)
        : device_(device), stream_(reinterpret_cast<cudaStream_t>(stream)), chunk_(chunk) {
        check_sizes(threads, chunk);
        if (buffers < 1) throw py::value_error("a reader needs one buffer for each thread at least");
        const CurrentDevice current(device);
        ready_ = std::make_unique<Event>();
        for (int i = 0; i < threads; ++i) lanes_.emplace_back(device, chunk, buffers, ready_.get());
    }
    void read(const Files& files, const Pieces& pieces, const Progress& progress) {
        {
            const CurrentDevice current(device_);
            ready_->record(stream_);
        }
        read_with(lanes_, chunk_, files, pieces, progress);
    }
};
#endif

}  // namespace

void bind_reader(py::module_& m) {
    py::class_<HostReader>(m, "HostReader")
        .def(py::init<int, int64_t>(), py::arg("threads"), py::arg("chunk") = 4 << 20)
        .def("read", &HostReader::read, py::arg("files"), py::arg("pieces"), py::arg("progress"));
#ifdef PYLLAMA_CUDA_RUNTIME
    py::register_local_exception_translator([](std::exception_ptr error) {
        try {
            if (error) std::rethrow_exception(error);
        } catch (const OutOfMemory& out) {
            PyErr_SetString(PyExc_MemoryError, out.what());
        }
    });
    py::class_<DeviceReader>(m, "DeviceReader")
        .def(py::init<int, uintptr_t, int, int, int64_t>(), py::arg("device"), py::arg("stream"), py::arg("threads"),
             py::arg("buffers") = 2, py::arg("chunk") = 2 << 20)
        .def("read", &DeviceReader::read, py::arg("files"), py::arg("pieces"), py::arg("progress"));
#endif
}
