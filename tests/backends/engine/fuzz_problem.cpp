// Problems that lie, for libFuzzer. An input is a batch in real memory, of exactly the size that it says; after that,
// any of its other numbers may be replaced: lengths, offsets, sizes, strides, capacities, options. The engine has to
// refuse it, or to stay within its memory, which AddressSanitizer watches. If nothing lies, all outputs have to be
// written, and with the same bits on one thread and on two.
//
// With -DOTALIGN_REPLAY, a program that runs the inputs in the files that it is given.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <iterator>
#include <limits>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cpu/batch.h"
#include "cpu/engine.h"

using namespace otalign;

namespace {

// Bytes of an input; zeros at its end.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}
  uint8_t byte() { return at_ < end_ ? *at_++ : 0; }
  int64_t below(int64_t limit) { return byte() % limit; }
  bool flag(int one_in) { return byte() % one_in == 1; }
  bool ended() const { return at_ >= end_; }

 private:
  const uint8_t *at_, *end_;
};

// A block of the heap, of exactly so many bytes, so that AddressSanitizer sees the first byte beyond it.
class Block {
 public:
  explicit Block(int64_t bytes = 0, uint8_t fill = 0xff) : bytes_(bytes), data_(new char[bytes > 0 ? bytes : 1]) {
    std::memset(data_.get(), fill, bytes > 0 ? bytes : 1);
  }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }
  template <class T>
  Span<T> span() const {
    return {reinterpret_cast<T*>(data_.get()), bytes_};
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_;
  std::unique_ptr<char[]> data_;
};

constexpr double kInfinity = std::numeric_limits<double>::infinity();
const double kNumbers[] = {0.5,   1,         -1,         0.25,         2,     0,    1e-3, 3, 1e3, 1e30,
                           -1e30, kInfinity, -kInfinity, std::nan(""), 1e-40, 1e300};
const int64_t kLies[] = {
    0,         1,         -1, 2, 7,  16, 1 << 20, INT32_MAX, int64_t{1} << 31, int64_t{1} << 40, INT64_MAX / 8,
    INT64_MAX, INT64_MIN, -8, 3, 100};
const double kOptions[] = {0.1,   1, 0.01, 1e-4,      10,           1e4,  1e-30, 1e-300,
                           1e300, 0, -1,   kInfinity, std::nan(""), 1e-6, 5,     0.5};

// Numbers of a type, all of them valid floats or, rarely, special.
void fill(const Block& block, Scalar type, Input& in, int special_one_in) {
  const int64_t size = static_cast<int64_t>(cpu::bytes(type)), count = block.bytes() / size;
  uint64_t state = 1 + in.byte() * 2654435761u;
  const bool special = in.flag(special_one_in);
  for (int64_t k = 0; k < count; ++k) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const uint8_t draw = state >> 56;
    double number = (static_cast<double>(state >> 40) / (1 << 23) - 1) * (draw < 8 ? 30 : 1);
    if (special && draw > 240) number = kNumbers[draw % 16];
    const float narrow = static_cast<float>(number);
    switch (type) {
      case Scalar::f64:
        block.as<double>()[k] = number;
        break;
      case Scalar::f32:
        block.as<float>()[k] = narrow;
        break;
      case Scalar::bf16: {
        uint32_t bits;
        std::memcpy(&bits, &narrow, 4);
        block.as<uint16_t>()[k] = static_cast<uint16_t>(bits >> 16);
        break;
      }
      case Scalar::f16:
        block.as<uint16_t>()[k] = static_cast<uint16_t>((state >> 33 & 0x8000) | (0x3800 + (state >> 20 & 0x3ff)));
        break;
    }
  }
}

struct SideMemory {
  std::vector<int64_t> values;  // the lengths, as they are
  Block lengths, starts, points, weights, potential, mass, scale, exponent, gradient, weights_gradient;
};

// One side of a batch without lies.
void make_side(Side& side, SideMemory& memory, Input& in, int64_t items, int64_t dim, int64_t number, bool given) {
  const bool packed = !given && in.flag(3);
  int64_t longest = 0, total = 0;
  memory.lengths = Block(items * 8);
  memory.starts = Block(items * 8);
  for (int64_t b = 0; b < items; ++b) {
    const int64_t length = in.below(in.flag(16) ? 60 : 9);
    memory.values.push_back(length);
    memory.lengths.as<int64_t>()[b] = length;
    memory.starts.as<int64_t>()[b] = total;
    total += length;
    longest = length > longest ? length : longest;
  }
  side.lengths = memory.lengths.span<const int64_t>();
  if (packed) side.starts = memory.starts.span<const int64_t>();
  side.size = longest + in.below(3);
  side.rows = packed ? total + in.below(3) : items * side.size;
  if (!given) {
    side.points_type = static_cast<Scalar>(in.below(4));
    side.row_stride = std::max<int64_t>(dim + in.below(3), 1);
    side.item_stride = in.flag(8) ? 0 : side.size * side.row_stride + in.below(3);
    const int64_t slots = packed ? 1 : items, rows = packed ? side.rows : side.size;
    const int64_t count = slots && rows ? (slots - 1) * side.item_stride + (rows - 1) * side.row_stride + dim : 0;
    memory.points = Block(count * static_cast<int64_t>(cpu::bytes(side.points_type)));
    fill(memory.points, side.points_type, in, 6);
    side.points = memory.points.span<const void>();
    memory.gradient = Block(side.rows * dim * static_cast<int64_t>(cpu::bytes(side.points_type)));
  }
  for (Block* block : {&memory.potential, &memory.mass, &memory.scale, &memory.exponent, &memory.weights_gradient})
    *block = Block(side.rows * number);
  side.potential = memory.potential.span<void>();
  side.mass = memory.mass.span<void>();
  side.scale = memory.scale.span<void>();
  side.exponent = memory.exponent.span<void>();
  if (in.flag(2)) {
    memory.weights = Block(side.rows * number);
    const bool zeros = in.flag(3);
    int64_t row = 0;
    for (int64_t b = 0; b < items; ++b) {
      row = packed ? memory.starts.as<int64_t>()[b] : b * side.size;
      for (int64_t i = 0; i < memory.values[b]; ++i) {
        const double weight = (zeros && i % 2 ? 0 : 1.0) / (zeros ? (memory.values[b] + 1) / 2 : memory.values[b]);
        if (number == 8)
          memory.weights.as<double>()[row + i] = weight;
        else
          memory.weights.as<float>()[row + i] = static_cast<float>(weight);
      }
    }
    side.weights = memory.weights.span<const void>();
  }
}

// A batch and its memory.
struct Batch {
  Problem p{};
  Gradients g{};
  SideMemory x, y;
  Block given, reg, init, plan, distance, value, linear, error, n_iter, dense;
  Block by_value, by_linear, by_plan, given_gradient;
  bool lies = false;
};

bool stop_after(void* left) { return --*static_cast<int*>(left) < 0; }

void make(Batch& batch, Input& in) {
  Problem& p = batch.p;
  p.items = in.below(5);
  p.dim = in.below(in.flag(8) ? 40 : 7);
  p.is_double = in.flag(2);
  const int64_t number = p.is_double ? 8 : 4;
  p.cost = static_cast<Cost>(in.below(5));
  const bool given = p.cost == Cost::given;
  make_side(p.x, batch.x, in, p.items, p.dim, number, given);
  make_side(p.y, batch.y, in, p.items, p.dim, number, given);
  if (given) {
    p.given_type = static_cast<Scalar>(in.below(4));
    p.given_strides[2] = 1 + in.below(2);
    p.given_strides[1] = p.y.size * p.given_strides[2] + in.below(3);
    p.given_strides[0] = in.flag(6) ? 0 : p.x.size * p.given_strides[1];
    int64_t count = p.items && p.x.size && p.y.size ? 1 : 0;
    const int64_t sizes[] = {p.items, p.x.size, p.y.size};
    for (int k = 0; k < 3 && count; ++k) count += (sizes[k] - 1) * p.given_strides[k];
    batch.given = Block(count * static_cast<int64_t>(cpu::bytes(p.given_type)));
    fill(batch.given, p.given_type, in, 4);
    p.given = batch.given.span<const void>();
    batch.given_gradient = Block(p.items * p.x.size * p.y.size * static_cast<int64_t>(cpu::bytes(p.given_type)));
  }
  p.prior = static_cast<PriorKind>(in.flag(2) ? 0 : in.below(5));
  p.prior_parameters[0] = kOptions[in.below(6)];
  p.prior_parameters[1] = kOptions[in.below(6)];
  batch.reg = Block(p.items * 8);
  for (int64_t b = 0; b < p.items; ++b) batch.reg.as<double>()[b] = kOptions[in.below(8)];
  p.reg = batch.reg.span<const double>();
  p.rho_x = in.flag(2) ? kOptions[in.below(7)] : kInfinity;
  p.rho_y = in.flag(2) ? kOptions[in.below(7)] : kInfinity;
  p.max_iter = 1 + in.below(40);
  p.tol = in.flag(3) ? 0 : kOptions[in.below(5)] * 1e-2;
  p.accelerate = in.flag(2);
  if (in.flag(4)) {
    batch.init = Block(p.y.rows * number);
    fill(batch.init, p.is_double ? Scalar::f64 : Scalar::f32, in, 8);
    p.init = batch.init.span<const void>();
  }
  for (int64_t b = 0; b < p.items; ++b) p.capacity += plan_stride(batch.x.values[b], batch.y.values[b]);
  p.capacity += in.below(3);
  batch.plan = Block(p.capacity * number);
  p.plan = batch.plan.span<void>();
  if (p.cost == Cost::euclidean) {
    batch.distance = Block(p.capacity * number);
    p.distance = batch.distance.span<void>();
  }
  batch.value = Block(p.items * number);
  batch.linear = Block(p.items * number);
  batch.error = Block(p.items * number);
  batch.n_iter = Block(p.items * 4);
  p.value = batch.value.span<void>();
  p.linear = batch.linear.span<void>();
  p.error = batch.error.span<void>();
  p.n_iter = batch.n_iter.span<int32_t>();
  p.threads = 1;
  batch.dense = Block(p.items * p.x.size * p.y.size * number);

  Gradients& g = batch.g;
  const Scalar type = p.is_double ? Scalar::f64 : Scalar::f32;
  batch.by_value = Block(p.items * number);
  batch.by_linear = Block(p.items * number);
  batch.by_plan = Block(p.capacity * number);
  for (Block* block : {&batch.by_value, &batch.by_linear, &batch.by_plan}) fill(*block, type, in, 12);
  if (!in.flag(3)) g.value = batch.by_value.span<const void>();
  if (in.flag(2)) g.linear = batch.by_linear.span<const void>();
  if (in.flag(3)) g.plan = batch.by_plan.span<const void>();
  if (!given && !in.flag(5)) g.x = batch.x.gradient.span<void>();
  if (!given && !in.flag(5)) g.y = batch.y.gradient.span<void>();
  if (given && !in.flag(5)) g.given = batch.given_gradient.span<void>();
  if (p.x.weights && in.flag(2)) g.a = batch.x.weights_gradient.span<void>();
  if (p.y.weights && in.flag(2)) g.b = batch.y.weights_gradient.span<void>();
}

// A field by number, and what it says from now on.
void lie(Batch& batch, Input& in, uint8_t field) {
  Problem& p = batch.p;
  const uint8_t choice = in.byte();
  const int64_t number = kLies[choice % 16];
  const double option = kOptions[choice % 16];
  Side& side = field & 1 ? p.y : p.x;
  SideMemory& memory = field & 1 ? batch.y : batch.x;
  const auto any = [&](const Block& block) -> int64_t* {
    return block.bytes() >= 8 ? block.as<int64_t>() + in.byte() % (block.bytes() / 8) : nullptr;
  };
  batch.lies = true;
  switch (field / 2 % 20) {
    case 0:
      if (int64_t* length = any(memory.lengths)) *length = number;
      break;
    case 1:
      if (int64_t* start = any(memory.starts)) *start = number;
      break;
    case 2:
      side.size = number;
      break;
    case 3:
      side.rows = number;
      break;
    case 4:
      side.row_stride = number;
      break;
    case 5:
      side.item_stride = number;
      break;
    case 6:
      p.items = number;
      break;
    case 7:
      p.dim = number;
      break;
    case 8:
      p.capacity = number;
      break;
    case 9:
      p.given_strides[in.below(3)] = number;
      break;
    case 10:
      p.threads = static_cast<int32_t>(number < 64 ? number : 64);  // each has memory of its own
      break;
    case 11:
      p.max_iter = number;
      break;
    case 12:
      if (int64_t* reg = any(batch.reg)) std::memcpy(reg, &option, 8);
      break;
    case 13:
      (field & 1 ? p.rho_x : p.rho_y) = option;
      break;
    case 14:
      p.tol = option;
      break;
    case 15:
      p.prior_parameters[field & 1] = option;
      break;
    case 16:
      side.points_type = static_cast<Scalar>(choice % 4);
      break;
    case 17:
      p.symmetric = true;
      break;
    case 18:  // an output, or an input, that is not there, or shorter
      switch (in.below(8)) {
        case 0:
          p.value = {};
          break;
        case 1:
          p.plan.bytes /= 2;
          break;
        case 2:
          side.potential = {};
          break;
        case 3:
          batch.g.x.bytes /= 2;
          break;
        case 4:
          p.n_iter = {};
          break;
        case 5:
          side.lengths = {};
          break;
        case 6:
          batch.g.plan.bytes /= 2;
          break;
        default:
          side.points.bytes -= 1;
      }
      break;
    default:
      p.is_double = !p.is_double;
  }
}

// Whether the call has not refused the batch.
template <class F>
bool accepted(F call) {
  try {
    call();
    return true;
  } catch (const std::invalid_argument&) {
  } catch (const std::bad_alloc&) {
  }
  return false;
}

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "FAILED: %s\n", what);
  std::abort();
}

// No number of an output is as it was before the call: all bits set.
void require_written(const Block& block, int64_t number, int64_t begin, int64_t count, const char* name) {
  static const std::vector<uint8_t> untouched(8, 0xff);
  for (int64_t k = begin; k < begin + count; ++k)
    require(std::memcmp(block.as<char>() + k * number, untouched.data(), number) != 0, name);
}

bool same(const Block& one, const Block& two) { return !std::memcmp(one.as<char>(), two.as<char>(), one.bytes()); }

void check_honest(const Batch& batch) {
  const Problem& p = batch.p;
  const int64_t number = p.is_double ? 8 : 4;
  require_written(batch.value, number, 0, p.items, "value is written");
  require_written(batch.linear, number, 0, p.items, "linear is written");
  require_written(batch.error, number, 0, p.items, "error is written");
  require_written(batch.n_iter, 4, 0, p.items, "n_iter is written");
  require_written(batch.x.potential, number, 0, p.x.rows, "f is written");
  require_written(batch.y.potential, number, 0, p.y.rows, "g is written");
  int64_t at = 0;
  for (int64_t b = 0; b < p.items; ++b) {
    require_written(batch.plan, number, at, plan_stride(batch.x.values[b], batch.y.values[b]), "the plan is written");
    at += plan_stride(batch.x.values[b], batch.y.values[b]);
  }
}

void check_gradients(const Batch& batch) {
  const Problem& p = batch.p;
  for (const auto& [side, memory, out] :
       {std::make_tuple(&p.x, &batch.x, batch.g.x), std::make_tuple(&p.y, &batch.y, batch.g.y)}) {
    const int64_t size = static_cast<int64_t>(cpu::bytes(side->points_type));
    if (out) require_written(memory->gradient, size, 0, memory->gradient.bytes() / size, "a gradient is written");
  }
}

bool run(Batch& batch, int polls) {
  bool finished = false;
  const bool solved = accepted([&] { finished = cpu::forward(batch.p, Poll{&stop_after, &polls}); });
  if (!batch.lies) {
    require(solved, "an honest batch is not refused");
    if (finished) check_honest(batch);
  }
  return solved && finished;
}

void take(Input& in) {
  const Input copy = in;
  Batch batch;
  make(batch, in);
  Input rest = in;
  const bool honest = rest.byte() % 4 == 0;
  const int polls = rest.flag(6) ? 1 : 60;
  if (!honest)
    for (int k = 0; k < 3; ++k) {
      const uint8_t field = rest.byte();
      if (field % 64 < 40) lie(batch, rest, field % 64);
    }
  const bool finished = run(batch, polls);
  if (!batch.lies && finished) {
    Batch again;
    Input same_input = copy;
    make(again, same_input);
    again.p.threads = 2;
    if (run(again, polls))
      require(
          same(batch.plan, again.plan) && same(batch.value, again.value) && same(batch.x.potential, again.x.potential),
          "two threads make the bits of one");
  }
  if (rest.flag(5)) lie(batch, rest, rest.byte() % 40);  // what a caller's tensors may do between the passes
  int left = polls;
  bool reversed = false;
  const bool taken = accepted([&] { reversed = cpu::backward(batch.p, batch.g, Poll{&stop_after, &left}); });
  if (!batch.lies && finished) {
    require(taken, "an honest batch is not refused backward");
    if (reversed) check_gradients(batch);
  }
  accepted([&] { cpu::unpack(batch.p, batch.dense.span<void>(), Poll{}); });
  accepted([&] { cpu::pack(batch.p, batch.dense.span<const void>(), Poll{}); });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  take(in);
  return 0;
}

#ifdef OTALIGN_REPLAY
int main(int count, char** paths) {
  for (int k = 1; k < count; ++k) {
    std::ifstream file(paths[k], std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    if (!file) return std::fprintf(stderr, "cannot read %s\n", paths[k]), 1;
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
  }
  std::printf("%d inputs: each refused or harmless\n", count - 1);
}
#endif
