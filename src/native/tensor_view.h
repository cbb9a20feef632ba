// What a Python tensor holds, read without copying: torch's C exchange table where it has one (tens of nanoseconds), else
// `__dlpack__`. Both are DLPack, so no torch headers are needed and one build serves every torch.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

namespace unrolled {

namespace nb = nanobind;

enum class Kind { float32, float64, int64, boolean };

// A checked argument. `data` is null where the argument was None and may be.
class TensorView {
public:
    // Reads `object`; `name` is how error messages call it.
    TensorView(nb::handle object, const char* name);
    // A float32 `[T B F]` in memory of our own.
    TensorView(float* data, int64_t T, int64_t B, int64_t F, const char* name);

    explicit operator bool() const { return data_ != nullptr || given_; }
    bool given() const { return given_; }
    const char* name() const { return name_; }
    int dimensions() const { return dimensions_; }
    int64_t size(int dimension) const { return shape_[dimension]; }
    int64_t stride(int dimension) const { return strides_[dimension]; }

    // Entry `index` of the first dimension; nothing where there is no tensor. Check the shape first.
    TensorView part(int64_t index) const;
    // The first two dimensions the other way round. Check that there are two.
    TensorView transposed() const;
    // Whether `expect` and `expect_contiguous` would let it pass.
    bool is(Kind kind, std::initializer_list<int64_t> shape) const;
    bool is_contiguous() const;

    // Raise ValueError unless the tensor is of this kind and shape (-1: any size) and on the CPU.
    const TensorView& expect(Kind kind, std::initializer_list<int64_t> shape) const;
    const TensorView& expect_contiguous() const;  // row-major, without gaps
    const TensorView& expect_last_contiguous() const;

    template <class T>
    T* as() const {
        return static_cast<T*>(data_);
    }
    // The bytes from the first element to the last; for finding overlaps.
    const char* begin() const;
    const char* end() const;

private:
    [[noreturn]] void refuse(const std::string& expected, const std::string& got) const;
    void read_exchange(const void* dltensor);
    std::string shape_text() const;

    static constexpr int most_dimensions = 4;
    const char* name_;
    bool given_ = false;
    void* data_ = nullptr;
    int code_ = 0, bits_ = 0, lanes_ = 1, device_ = 0, dimensions_ = 0;
    int64_t shape_[most_dimensions] = {}, strides_[most_dimensions] = {};
    nb::object keep_;  // owner of memory that an import made
};

// Raise ValueError if any of the tensors written overlaps one that is read, or another one written.
void expect_apart(const std::vector<const TensorView*>& written, const std::vector<const TensorView*>& read);

}  // namespace unrolled
