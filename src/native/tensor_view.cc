#include "tensor_view.h"

#include <algorithm>
#include <cstring>

namespace unrolled {
namespace {

// DLPack 1.x, as far as it is needed here (github.com/dmlc/dlpack, include/dlpack/dlpack.h).
struct DlTensor {
    void* data;
    struct {
        int32_t type, id;
    } device;
    int32_t ndim;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};

struct DlExchange {
    struct {
        struct {
            uint32_t major, minor;
        } version;
        void* previous;
    } header;
    void* managed_allocator;
    void* managed_from_object;
    void* managed_to_object;
    int (*tensor_from_object)(void* object, DlTensor* out);
    void* current_stream;
};

constexpr int cpu = 1, code_int = 0, code_float = 2, code_bool = 6;

// The exchange table of a type, or null. Tensors come in very few types, asked for at every call.
const DlExchange* exchange_of(PyTypeObject* type) {
    struct Entry {
        PyTypeObject* type;
        const DlExchange* table;
    };
    static Entry known[8];
    static int count = 0;
    for (int i = 0; i < count; ++i)
        if (known[i].type == type) return known[i].table;
    const DlExchange* table = nullptr;
    PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
    if (capsule != nullptr) {
        table = static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
        Py_DECREF(capsule);
    }
    PyErr_Clear();
    if (table != nullptr && (table->header.version.major != 1 || table->tensor_from_object == nullptr)) table = nullptr;
    if (count < 8) {
        Py_INCREF(type);  // an address that is remembered must not be given to another type
        known[count++] = {type, table};
    }
    return table;
}

int code_of(Kind kind) { return kind == Kind::int64 ? code_int : kind == Kind::boolean ? code_bool : code_float; }
int bits_of(Kind kind) { return kind == Kind::float32 ? 32 : kind == Kind::boolean ? 8 : 64; }

std::string kind_name(Kind kind) {
    switch (kind) {
        case Kind::float32: return "float32";
        case Kind::float64: return "float64";
        case Kind::int64: return "int64";
        default: return "bool";
    }
}

}  // namespace

TensorView::TensorView(nb::handle object, const char* name) : name_(name) {
    if (object.is_none()) return;
    given_ = true;
    if (const DlExchange* exchange = exchange_of(Py_TYPE(object.ptr()))) {
        DlTensor tensor;
        if (exchange->tensor_from_object(object.ptr(), &tensor) != 0) throw nb::python_error();
        read_exchange(&tensor);
        return;
    }
    nb::object plain = nb::borrow(object);
    if (nb::hasattr(plain, "detach")) plain = plain.attr("detach")();
    nb::ndarray<> array;
    if (!nb::try_cast(plain, array)) refuse("a tensor", Py_TYPE(object.ptr())->tp_name);
    keep_ = plain;
    if (array.ndim() > most_dimensions) refuse("at most 4 dimensions", std::to_string(array.ndim()));
    dimensions_ = static_cast<int>(array.ndim());
    for (int i = 0; i < dimensions_; ++i) {
        shape_[i] = static_cast<int64_t>(array.shape(static_cast<size_t>(i)));
        strides_[i] = array.stride(static_cast<size_t>(i));
    }
    data_ = array.data();
    device_ = array.device_type();
    code_ = array.dtype().code;
    bits_ = array.dtype().bits;
    lanes_ = array.dtype().lanes;
}

TensorView::TensorView(float* data, int64_t T, int64_t B, int64_t F, const char* name)
    : name_(name), given_(true), data_(data), code_(code_float), bits_(32), device_(cpu), dimensions_(3), shape_{T, B, F},
      strides_{B * F, F, 1} {}

TensorView TensorView::part(int64_t index) const {
    TensorView view = *this;
    if (!given_) return view;
    if (data_ != nullptr) view.data_ = static_cast<char*>(data_) + index * strides_[0] * (bits_ / 8);
    view.dimensions_ = dimensions_ - 1;
    std::copy(shape_ + 1, shape_ + dimensions_, view.shape_);
    std::copy(strides_ + 1, strides_ + dimensions_, view.strides_);
    return view;
}

TensorView TensorView::transposed() const {
    TensorView view = *this;
    std::swap(view.shape_[0], view.shape_[1]);
    std::swap(view.strides_[0], view.strides_[1]);
    return view;
}

void TensorView::read_exchange(const void* pointer) {
    const DlTensor& tensor = *static_cast<const DlTensor*>(pointer);
    if (tensor.ndim > most_dimensions) refuse("at most 4 dimensions", std::to_string(tensor.ndim));
    dimensions_ = tensor.ndim;
    int64_t dense = 1;
    for (int i = dimensions_ - 1; i >= 0; --i) {
        shape_[i] = tensor.shape[i];
        strides_[i] = tensor.strides != nullptr ? tensor.strides[i] : dense;
        dense *= shape_[i];
    }
    data_ = tensor.data == nullptr ? nullptr : static_cast<char*>(tensor.data) + tensor.byte_offset;
    device_ = tensor.device.type;
    code_ = tensor.dtype.code;
    bits_ = tensor.dtype.bits;
    lanes_ = tensor.dtype.lanes;
}

std::string TensorView::shape_text() const {
    std::string text = "[";
    for (int i = 0; i < dimensions_; ++i) text += (i ? ", " : "") + std::to_string(shape_[i]);
    return text + "]";
}

void TensorView::refuse(const std::string& expected, const std::string& got) const {
    throw nb::value_error((std::string(name_) + ": expected " + expected + ", got " + got).c_str());
}

bool TensorView::is(Kind kind, std::initializer_list<int64_t> shape) const {
    if (!given_ || code_ != code_of(kind) || bits_ != bits_of(kind) || lanes_ != 1 || device_ != cpu) return false;
    if (static_cast<int>(shape.size()) != dimensions_) return false;
    int64_t numbers = 1;
    for (int i = 0; i < dimensions_; ++i) {
        if (shape.begin()[i] >= 0 && shape.begin()[i] != shape_[i]) return false;
        numbers *= shape_[i];
    }
    return numbers == 0 || data_ != nullptr;
}

bool TensorView::is_contiguous() const {
    int64_t dense = 1;
    for (int i = dimensions_ - 1; i >= 0; --i) {
        if (shape_[i] == 0) return true;
        if (shape_[i] != 1 && strides_[i] != dense) return false;
        dense *= shape_[i];
    }
    return true;
}

const TensorView& TensorView::expect(Kind kind, std::initializer_list<int64_t> shape) const {
    if (!given_) refuse("a tensor", "None");
    if (is(kind, shape)) return *this;
    if (code_ != code_of(kind) || bits_ != bits_of(kind) || lanes_ != 1)
        refuse(kind_name(kind), "another type (DLPack code " + std::to_string(code_) + ", " + std::to_string(bits_) + " bits)");
    if (device_ != cpu) refuse("a tensor on the CPU", "one on device type " + std::to_string(device_));
    bool fits = static_cast<int>(shape.size()) == dimensions_;
    for (int i = 0; fits && i < dimensions_; ++i) fits = shape.begin()[i] < 0 || shape.begin()[i] == shape_[i];
    if (!fits) {
        std::string wanted = "[";
        for (size_t i = 0; i < shape.size(); ++i)
            wanted += (i ? ", " : "") + (shape.begin()[i] < 0 ? std::string("any") : std::to_string(shape.begin()[i]));
        refuse("shape " + wanted + "]", shape_text());
    }
    refuse("a tensor with memory", "one without (a fake or meta tensor)");
}

const TensorView& TensorView::expect_contiguous() const {
    if (!is_contiguous()) refuse("a contiguous tensor", "strides that leave gaps");
    return *this;
}

const TensorView& TensorView::expect_last_contiguous() const {
    if (dimensions_ > 0 && shape_[dimensions_ - 1] > 1 && strides_[dimensions_ - 1] != 1)
        refuse("a last dimension without gaps", "stride " + std::to_string(strides_[dimensions_ - 1]));
    for (int i = 0; i < dimensions_; ++i)
        if (strides_[i] < 0) refuse("strides that are not negative", std::to_string(strides_[i]));
    return *this;
}

const char* TensorView::begin() const { return static_cast<const char*>(data_); }

const char* TensorView::end() const {
    int64_t last = 0;
    for (int i = 0; i < dimensions_; ++i) {
        if (shape_[i] == 0) return begin();
        last += (shape_[i] - 1) * strides_[i];
    }
    return begin() + (last + 1) * (bits_ / 8);
}

void expect_apart(const std::vector<const TensorView*>& written, const std::vector<const TensorView*>& read) {
    const auto overlap = [](const TensorView& a, const TensorView& b) {
        return a.given() && b.given() && a.begin() < b.end() && b.begin() < a.end();
    };
    for (size_t i = 0; i < written.size(); ++i) {
        for (const TensorView* other : read)
            if (overlap(*written[i], *other))
                throw nb::value_error((std::string(written[i]->name()) + " and " + other->name() +
                                       ": expected separate memory, got tensors that overlap")
                                          .c_str());
        for (size_t j = i + 1; j < written.size(); ++j)
            if (overlap(*written[i], *written[j]))
                throw nb::value_error((std::string(written[i]->name()) + " and " + written[j]->name() +
                                       ": expected separate memory, got tensors that overlap")
                                          .c_str());
    }
}

}  // namespace unrolled
