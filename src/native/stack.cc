// Stacks of layers on a dense batch, for inference: what `forward` would do layer by layer, in one call, since for a
// single step the ways between Python and here take longer than the arithmetic.
#include <nanobind/nanobind.h>

#include <cstring>
#include <utility>
#include <vector>

#include "given.h"
#include "kernels.h"
#include "memory.h"
#include "tensor_view.h"

namespace unrolled {
namespace {

constexpr const char* weight_names[4] = {"weight_ih", "weight_hh", "bias_ih", "bias_hh"};

struct Stack {
    int cell;
    bool bf16, both, bias;
    TensorView x;
    std::vector<TensorView> weights;  // two or four (`bias`) for each direction, in the order of torch.nn's layers
    TensorView h0, c0;                // [layers*D B H]
    TensorView outputs, h, c;  // new memory, which nothing else can overlap
    Packs packs;  // of each direction, or none at all
};

void run(Stack s, int threads) {
    const int64_t directions = s.both ? 2 : 1, each = s.bias ? 4 : 2;
    TensorView& x = s.x;
    x.expect(Kind::float32, {-1, -1, -1}).expect_last_contiguous();
    const int64_t T = x.size(0), B = x.size(1);
    s.h0.expect(Kind::float32, {-1, B, -1}).expect_contiguous();
    const int64_t count = s.h0.size(0), H = s.h0.size(2);
    const bool lstm = cell_of(s.cell) == Cell::lstm;
    s.h.expect(Kind::float32, {count, B, H}).expect_contiguous();
    if (lstm) {
        s.c0.expect(Kind::float32, {count, B, H}).expect_contiguous();
        s.c.expect(Kind::float32, {count, B, H}).expect_contiguous();
    }
    s.outputs.expect(Kind::float32, {T, B, directions * H}).expect_contiguous();
    const auto given_weights = static_cast<int64_t>(s.weights.size());
    if (count < 1 || count % directions != 0 || given_weights != count * each)
        refuse("weights: expected " + std::to_string(count * each) + " tensors, got " + std::to_string(given_weights));
    if (!s.packs.empty() && static_cast<int64_t>(s.packs.size()) != count) refuse("packs: expected one for each direction");
    const std::vector<bool> reverse = s.both ? std::vector<bool>{false, true} : std::vector<bool>{false};
    Scratch between[2];  // outputs of the layers below the last one, in turn
    for (int64_t k = 0; k < count; k += directions) {
        std::vector<Direction> ways;
        ways.reserve(2);
        Packs own;
        for (int64_t d = k; d < k + directions; ++d) {
            const auto weight = [&](int64_t i) {
                return i < each ? s.weights[static_cast<size_t>(d * each + i)] : TensorView(nb::none(), weight_names[i]);
            };
            // Only an LSTM has a c_0; what another cell is given has not been looked at.
            TensorView first = lstm ? s.c0.part(d) : TensorView(nb::none(), "c_0");
            ways.emplace_back(weight(0), weight(1), weight(2), weight(3), s.h0.part(d), std::move(first));
            if (!s.packs.empty()) own.push_back(s.packs[static_cast<size_t>(d)]);
        }
        const Given given(s.cell, s.bf16, reverse, x, {nb::none(), "ids"}, {nb::none(), "lengths"}, std::move(ways), own, false, 1);
        Forward f{};
        f.cell = given.cell, f.bf16 = s.bf16, f.directions = given.directions, f.extent = given.extent, f.inputs = given.inputs;
        if (f.extent.H != H) refuse("weight_hh: expected " + std::to_string(H) + " hidden units, as h_0 has");
        const bool last = k + directions == count;
        Scratch& mine = between[(k / directions) & 1];
        if (!last) mine = Scratch(static_cast<size_t>(T * B * directions * H) * 4);
        f.outputs = last ? s.outputs.as<float>() : mine.as<float>();
        for (int d = 0; d < f.directions; ++d) {
            f.reverse[d] = given.reverse[d];
            f.weights[d] = given.weights[d], f.packed[d] = given.packed[d];
            f.h0[d] = given.h0(d), f.c0[d] = given.c0(d);
            f.h_n[d] = s.h.as<float>() + (k + d) * B * H;
            f.c_n[d] = lstm ? s.c.as<float>() + (k + d) * B * H : nullptr;
        }
        {
            nb::gil_scoped_release unlocked;
            kernels().forward(f, threads);
        }
        if (!last) x = TensorView(f.outputs, T, B, directions * H, "x");
    }
}

// --- a layer's own call

// What is asked of torch at every call, found once.
struct Torch {
    nb::object tensor, parameter, float32, bfloat16;
    nb::object grad_enabled, autocast_enabled, autocast_dtype, dispatch_modes, transforms, threads, empty;
    bool short_empty = false;
    nb::str cpu{"cpu"}, requires_grad{"requires_grad"}, is_neg{"is_neg"};
    // What a layer has.
    nb::str parameters{"_parameters"}, names{"_flat_weights_names"}, frozen{"_frozen"}, mode{"mode"}, backend{"backend"};
    nb::str training{"training"}, dropout{"dropout"}, recurrent_dropout{"recurrent_dropout"}, layers{"num_layers"};
    nb::str input_size{"input_size"}, hidden_size{"hidden_size"}, bias{"bias"}, both{"bidirectional"}, batch_first{"batch_first"};

    Torch() {
        const nb::module_ torch = nb::module_::import_("torch");
        const nb::object inner = torch.attr("_C");
        tensor = torch.attr("Tensor"), parameter = torch.attr("nn").attr("Parameter");
        float32 = torch.attr("float32"), bfloat16 = torch.attr("bfloat16");
        grad_enabled = torch.attr("is_grad_enabled"), autocast_enabled = torch.attr("is_autocast_enabled");
        autocast_dtype = torch.attr("get_autocast_dtype"), threads = torch.attr("get_num_threads");
        dispatch_modes = inner.attr("_len_torch_dispatch_stack"), transforms = inner.attr("_are_functorch_transforms_active");
        // What torch's own compiled graphs allocate with takes half the time.
        try {
            empty = inner.attr("_dynamo").attr("guards").attr("_empty_strided_cpu");
            short_empty = true;
        } catch (nb::python_error&) {
            empty = torch.attr("empty_strided");
        }
        for (nb::str* name : {&requires_grad, &is_neg, &parameters, &names, &frozen, &mode, &backend, &training, &dropout,
                              &recurrent_dropout, &layers, &input_size, &hidden_size, &bias, &both, &batch_first}) {
            PyObject* own = name->release().ptr();
            PyUnicode_InternInPlace(&own);
            *name = nb::steal<nb::str>(own);
        }
    }
    // Never destroyed, since Python may be gone by then; and no static's lock is held while an import gives way to others.
    static const Torch& get() {
        static Torch* found = nullptr;
        if (found == nullptr) {
            auto* made = new Torch;
            if (found == nullptr) found = made;
        }
        return *found;
    }

    // New memory for float32 `[a b c]`; the second dimension outside the first one if `turned`.
    nb::object make(int64_t a, int64_t b, int64_t c, bool turned) const {
        const nb::tuple sizes = nb::make_tuple(a, b, c);
        const nb::tuple strides = turned ? nb::make_tuple(c, a * c, 1) : nb::make_tuple(b * c, c, 1);
        if (short_empty) return empty(sizes, strides, float32);
        return empty(sizes, strides, nb::arg("dtype") = float32, nb::arg("device") = cpu);
    }
    bool is_plain(nb::handle x) const { return x.type().is(tensor); }
    bool wants_gradient(nb::handle x) const { return nb::getattr(x, requires_grad).is(nb::handle(Py_True)); }
};

// A tensor's memory as it is read, without gaps and not kept negated; `owner` holds what had to be copied for that.
TensorView ready(const Torch& torch, nb::object& owner, const char* name, bool whole) {
    if (nb::getattr(owner, torch.is_neg)().is(nb::handle(Py_True))) owner = owner.attr("resolve_neg")();
    TensorView view(owner, name);
    const int last = view.dimensions() - 1;
    const bool dense = whole ? view.is_contiguous() : last < 0 || view.size(last) == 1 || view.stride(last) == 1;
    if (dense) return view;
    owner = owner.attr("contiguous")();
    return TensorView(owner, name);
}

// A layer's attributes, without the detours of torch's modules: those that stand in its own dictionary.
class Attributes {
public:
    explicit Attributes(nb::handle layer) : all_(nb::steal(PyObject_GenericGetDict(layer.ptr(), nullptr))) {
        if (!all_.is_valid()) PyErr_Clear();
    }
    // Borrowed; null where there is none.
    nb::handle find(nb::handle name) const {
        if (!all_.is_valid()) return {};
        PyObject* found = PyDict_GetItemWithError(all_.ptr(), name.ptr());
        if (found == nullptr) PyErr_Clear();
        return found;
    }
    // What they say; `wrong` where one is not there or says nothing of the kind.
    bool truth(nb::handle name) {
        const nb::handle found = find(name);
        const int said = found.is_valid() ? PyObject_IsTrue(found.ptr()) : -1;
        if (said < 0) PyErr_Clear();
        wrong = wrong || said < 0;
        return said > 0;
    }
    int64_t size(nb::handle name) {
        const nb::handle found = find(name);
        int64_t said = -1;
        if (!found.is_valid() || !PyLong_CheckExact(found.ptr()) || !nb::try_cast(found, said) || said < 1 || said > 1 << 30)
            wrong = true;
        return said;
    }
    bool is(nb::handle name, std::initializer_list<const char*> texts) const {
        const nb::handle found = find(name);
        if (!found.is_valid() || !PyUnicode_CheckExact(found.ptr())) return false;
        for (const char* text : texts)
            if (PyUnicode_CompareWithASCIIString(found.ptr(), text) == 0) return true;
        return false;
    }

    bool wrong = false;

private:
    nb::object all_;
};

// What a drop-in layer returns, for a dense float32 batch whose gradient nobody asks for; None where that does not hold,
// or something is wrong, and the caller must see to it. One step of one row is a few microseconds of arithmetic: every
// look at a tensor counts.
//
// layer: it is asked for its weights, by name, as they are now, and for copies that it keeps because it was told to.
// x `[T B I]`, or `[B T I]` if batch_first; hx None, h_0 or, for an lstm, (h_0, c_0).
nb::object call(nb::handle layer, nb::handle x_, nb::handle hx) {
    const Torch& torch = Torch::get();
    if (!torch.is_plain(x_)) return nb::none();
    Attributes attributes(layer);
    const bool lstm = attributes.is(torch.mode, {"LSTM"});
    const int cell = static_cast<int>(lstm                                       ? Cell::lstm
                                      : attributes.is(torch.mode, {"GRU"})      ? Cell::gru
                                      : attributes.is(torch.mode, {"RNN_TANH"}) ? Cell::rnn
                                                                                : Cell::rnn_relu);
    if (cell == static_cast<int>(Cell::rnn_relu) && !attributes.is(torch.mode, {"RNN_RELU"})) return nb::none();
    const int64_t layers = attributes.size(torch.layers), input_size = attributes.size(torch.input_size);
    const int64_t hidden_size = attributes.size(torch.hidden_size);
    const bool bias = attributes.truth(torch.bias), both = attributes.truth(torch.both);
    const bool batch_first = attributes.truth(torch.batch_first);
    const bool drops = attributes.truth(torch.training) &&
                       (attributes.truth(torch.dropout) || attributes.truth(torch.recurrent_dropout));
    if (attributes.wrong || drops || !attributes.is(torch.backend, {"auto", "native"})) return nb::none();
    const bool grad = torch.grad_enabled().is(nb::handle(Py_True));
    if (grad && torch.wants_gradient(x_)) return nb::none();

    // The weights: parameters, unless something else stands in an attribute's place.
    const nb::handle own = attributes.find(torch.parameters), names = attributes.find(torch.names);
    if (!own.is_valid() || !names.is_valid() || !nb::isinstance<nb::dict>(own) || !nb::isinstance<nb::list>(names))
        return nb::none();
    std::vector<nb::object> weights;
    weights.reserve(8);
    for (const nb::handle name : nb::borrow<nb::list>(names)) {
        PyObject* weight = PyDict_GetItemWithError(own.ptr(), name.ptr());
        if (weight != nullptr && !attributes.find(name).is_valid()) {
            weights.push_back(nb::borrow(weight));
        } else {
            PyErr_Clear();
            weights.push_back(nb::steal(PyObject_GetAttr(layer.ptr(), name.ptr())));
            if (!weights.back().is_valid()) throw nb::python_error();
        }
        const nb::handle type = weights.back().type();
        if (!type.is(torch.parameter) && !type.is(torch.tensor)) return nb::none();
        if (grad && torch.wants_gradient(weights.back())) return nb::none();
    }

    nb::object states[2];
    if (!hx.is_none()) {
        if (lstm) {
            if (!PyTuple_CheckExact(hx.ptr()) || PyTuple_GET_SIZE(hx.ptr()) != 2) return nb::none();
            for (int i = 0; i < 2; ++i) states[i] = nb::borrow(PyTuple_GET_ITEM(hx.ptr(), i));
        } else {
            states[0] = nb::borrow(hx);
        }
        for (int i = 0; i < (lstm ? 2 : 1); ++i)
            if (!torch.is_plain(states[i]) || (grad && torch.wants_gradient(states[i]))) return nb::none();
    }
    if (nb::cast<int>(torch.dispatch_modes()) > 0 || torch.transforms().is(nb::handle(Py_True))) return nb::none();
    const bool bf16 = torch.autocast_enabled(torch.cpu).is(nb::handle(Py_True));
    if (bf16 && !torch.autocast_dtype(torch.cpu).is(torch.bfloat16)) return nb::none();

    Packs packs;
    std::vector<nb::object> kept;  // what the packs belong to
    if (const nb::handle frozen = attributes.find(torch.frozen); frozen.is_valid() && !frozen.is_none()) {
        for (const nb::handle layer_kept : frozen) {
            if (!nb::getattr(layer_kept, "bf16").is(nb::handle(bf16 ? Py_True : Py_False))) break;
            if (packs.empty()) weights.clear();
            kept.push_back(nb::borrow(layer_kept));
            for (const nb::handle pack : nb::getattr(layer_kept, "packs")) packs.push_back(nb::cast<const Pack*>(pack));
            for (const nb::handle way : nb::getattr(layer_kept, "directions"))
                for (int i = 0; i < (bias ? 4 : 2); ++i) weights.push_back(nb::borrow(way)[i]);
        }
    }

    nb::object x = nb::borrow(x_);
    const int64_t count = layers * (both ? 2 : 1);
    if (static_cast<int64_t>(weights.size()) != count * (bias ? 4 : 2)) return nb::none();
    std::vector<TensorView> views;
    views.reserve(weights.size());
    Scratch zeros;
    Stack s{cell, bf16, both, bias, {nb::none(), "x"}, {}, {nb::none(), "h_0"}, {nb::none(), "c_0"},
            {nb::none(), "outputs"}, {nb::none(), "h_n"}, {nb::none(), "c_n"}, std::move(packs)};
    try {
        s.x = ready(torch, x, "x", false);
        if (!s.x.is(Kind::float32, {-1, -1, input_size})) return nb::none();
        if (batch_first) s.x = s.x.transposed();
        for (const nb::object& weight : weights) {
            views.emplace_back(weight, weight_names[views.size() % (bias ? 4 : 2)]);
            const bool matrix = views.back().dimensions() == 2;
            if (!(matrix ? views.back().is(Kind::float32, {-1, -1}) : views.back().is(Kind::float32, {-1})) ||
                !views.back().is_contiguous())
                return nb::none();
        }
        const int64_t B = s.x.size(1);
        if (states[0].is_valid()) {
            s.h0 = ready(torch, states[0], "h_0", true);
            if (lstm) s.c0 = ready(torch, states[1], "c_0", true);
        } else {
            const size_t bytes = static_cast<size_t>(count * B * hidden_size) * 4;
            zeros = Scratch(bytes);
            std::memset(zeros.data(), 0, bytes);
            s.h0 = TensorView(zeros.as<float>(), count, B, hidden_size, "h_0");
            if (lstm) s.c0 = TensorView(zeros.as<float>(), count, B, hidden_size, "c_0");
        }
        if (!s.h0.is(Kind::float32, {count, B, hidden_size}) || (lstm && !s.c0.is(Kind::float32, {count, B, hidden_size})))
            return nb::none();
    } catch (nb::python_error&) {  // tensors without memory of their own: sparse ones and the like
        return nb::none();
    }
    s.weights = std::move(views);
    const int64_t T = s.x.size(0), B = s.x.size(1), width = hidden_size * (both ? 2 : 1);
    const nb::object outputs = batch_first ? torch.make(B, T, width, true) : torch.make(T, B, width, false);
    const nb::object h = torch.make(count, B, hidden_size, false);
    s.outputs = TensorView(outputs, "outputs");
    if (batch_first) s.outputs = s.outputs.transposed();
    s.h = TensorView(h, "h_n");
    nb::object c;
    if (lstm) {
        c = torch.make(count, B, hidden_size, false);
        s.c = TensorView(c, "c_n");
    }
    const int threads = nb::cast<int>(torch.threads());
    expect_threads(threads);
    run(std::move(s), threads);
    return nb::make_tuple(outputs, lstm ? nb::object(nb::make_tuple(h, c)) : h);
}

}  // namespace

void bind_stack(nb::module_& m) {
    using nb::arg;
    m.def("call", &call, arg("layer"), arg("x").none(), arg("hx").none());
}

}  // namespace unrolled
