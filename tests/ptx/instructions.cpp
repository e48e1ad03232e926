// What each opcode computes, under its whole name: an opcode with another suffix is another opcode, or an unknown one.
// Results are those of the PTX ISA, version 9.0.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>

#include "machine.h"

namespace ptx {
namespace {

// ---- An operand's values

template <typename T>
struct Source {
  const T* values;
  Source(const Warp& warp, const Slot& slot) : values(warp.at<T>(slot)) {}
  T operator[](uint32_t lane) const { return values[lane]; }
};
template <>
struct Source<bool> {
  uint32_t bits;
  Source(const Warp& warp, const Slot& slot) : bits(*warp.at<uint32_t>(slot)) {}
  bool operator[](uint32_t lane) const { return bits >> lane & 1; }
};

template <typename T>
struct Target {
  T* values;
  Target(const Warp& warp, const Slot& slot) : values(warp.at<T>(slot)) {}
  void set(uint32_t lane, T value) { values[lane] = value; }
  void finish(uint32_t) {}
};
template <>
struct Target<bool> {
  uint32_t* word;
  uint32_t bits = 0;
  Target(const Warp& warp, const Slot& slot) : word(warp.at<uint32_t>(slot)) {}
  void set(uint32_t lane, bool value) { bits |= static_cast<uint32_t>(value) << lane; }
  void finish(uint32_t lanes) { *word = (*word & ~lanes) | (bits & lanes); }
};

template <typename Function>
void for_each_lane(uint32_t lanes, const Function& function) {
  for (; lanes != 0; lanes &= lanes - 1) function(static_cast<uint32_t>(std::countr_zero(lanes)));
}

template <typename T>
constexpr uint32_t kBytes = std::is_same_v<T, bool> ? 0 : sizeof(T);

using Table = std::unordered_map<std::string, Operation>;
Table table;

// ---- Instructions that compute one value from others

template <typename Function, typename Result, typename... Operands>
struct Computation {
  template <size_t... i>
  static void in_lanes(Warp& warp, const Instruction& instruction, uint32_t lanes, std::index_sequence<i...>) {
    const std::tuple<Source<Operands>...> from{Source<Operands>(warp, instruction.from[i])...};
    Target<Result> to(warp, instruction.to[0]);
    if (lanes == kAllLanes) {
      // A result may overwrite an operand of its own lane.
#pragma GCC ivdep
      for (uint32_t lane = 0; lane < kLanes; ++lane) to.set(lane, Function{}(std::get<i>(from)[lane]...));
    } else {
      for_each_lane(lanes, [&](uint32_t lane) { to.set(lane, Function{}(std::get<i>(from)[lane]...)); });
    }
    to.finish(lanes);
  }
  static void run(Warp& warp, const Instruction& instruction, uint32_t lanes) {
    in_lanes(warp, instruction, lanes, std::index_sequence_for<Operands...>());
  }
};

// ---- Whether a result has a value

uint32_t written(const Warp& warp, const Slot& slot) { return warp.written[slot.number]; }

// All sources from the `first` on.
template <int first>
uint32_t required(const Warp& warp, const Instruction& instruction, uint32_t lanes) {
  for (int i = first; i < instruction.from_count; ++i) require_written(warp, instruction.from[i], lanes);
  return lanes;
}

uint32_t address_required(const Warp& warp, const Instruction& instruction, uint32_t lanes) {
  require_written(warp, instruction.from[instruction.from_count - 1], lanes);
  return lanes;
}

uint32_t written_if_selected(const Warp& warp, const Instruction& instruction, uint32_t) {
  const auto& from = instruction.from;
  const uint32_t which = *warp.at<uint32_t>(from[2]);
  return written(warp, from[2]) & ((which & written(warp, from[0])) | (~which & written(warp, from[1])));
}

// One operand that decides the result is enough: false for and, true for or.
template <bool decides>
uint32_t written_or_decided(const Warp& warp, const Instruction& instruction, uint32_t) {
  const auto decided = [&](const Slot& slot) {
    const uint32_t bits = *warp.at<uint32_t>(slot);
    return written(warp, slot) & (decides ? bits : ~bits);
  };
  const Slot &a = instruction.from[0], &b = instruction.from[1];
  return (written(warp, a) & written(warp, b)) | decided(a) | decided(b);
}

template <typename Function, typename Result, typename... Operands>
void define(const std::string& opcode, Result (Function::*)(Operands...) const) {
  table[opcode] = {Computation<Function, Result, Operands...>::run, {kBytes<Result>}, {kBytes<Operands>...}};
}
// The function is a lambda that captures nothing.
template <typename Function>
void define(const std::string& opcode, Function) {
  define(opcode, &Function::operator());
}

// ---- Numbers

// An operation on float32 gives this nan only.
float canonical(float x) { return x == x ? x : std::bit_cast<float>(0x7FFFFFFFu); }
double canonical(double x) { return x; }

float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// The number that is `ulps` after x, away from zero.
float moved(float x, int ulps) { return std::isfinite(x) && x != 0.0f ? std::bit_cast<float>(std::bit_cast<uint32_t>(x) + ulps) : x; }

// To bfloat16 and float16, to the nearest, ties to even; nan becomes 0x7FFF.
uint16_t bfloat16_of(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return x == x ? static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16) : uint16_t{0x7FFF};
}
uint16_t float16_of(float x) { return x == x ? std::bit_cast<uint16_t>(static_cast<_Float16>(x)) : uint16_t{0x7FFF}; }

template <typename T>
void define_order(const std::string& type) {
  define("setp.eq." + type, [](T a, T b) { return a == b; });
  define("setp.lt." + type, [](T a, T b) { return a < b; });
  define("setp.le." + type, [](T a, T b) { return a <= b; });
  define("setp.gt." + type, [](T a, T b) { return a > b; });
  define("setp.ge." + type, [](T a, T b) { return a >= b; });
}

template <typename T>
void define_numbers(const std::string& type) {
  define_order<T>(type);
  define("add.rn." + type, [](T a, T b) { return canonical(a + b); });
  define("sub.rn." + type, [](T a, T b) { return canonical(a - b); });
  define("mul.rn." + type, [](T a, T b) { return canonical(a * b); });
  define("div.rn." + type, [](T a, T b) { return canonical(a / b); });
  define("fma.rn." + type, [](T a, T b, T c) { return canonical(std::fma(a, b, c)); });
  define("sqrt.rn." + type, [](T a) { return canonical(std::sqrt(a)); });
  define("rcp.rn." + type, [](T a) { return canonical(T(1) / a); });
  define("abs." + type, [](T a) { return std::fabs(a); });
  define("neg." + type, [](T a) { return -a; });
  define("setp.num." + type, [](T a, T b) { return a == a && b == b; });
  // The second letter u: also if a number is nan.
  define("setp.neu." + type, [](T a, T b) { return a != b; });
  define("setp.ltu." + type, [](T a, T b) { return !(a >= b); });
  define("setp.leu." + type, [](T a, T b) { return !(a > b); });
  define("setp.gtu." + type, [](T a, T b) { return !(a <= b); });
  define("setp.geu." + type, [](T a, T b) { return !(a < b); });
  define("setp.ne." + type, [](T a, T b) { return a < b || a > b; });
}

// ---- Integers

template <typename T>
void require_quotient(T a, T b) {
  if (b == 0) throw Fault("division by zero");
  if (std::is_signed_v<T> && b == T(-1) && a == std::numeric_limits<T>::min()) throw Fault("a quotient that overflows");
}

template <typename T, typename Wide>
void define_integers(const std::string& type) {
  using Unsigned = std::make_unsigned_t<T>;
  define_order<T>(type);
  define("setp.ne." + type, [](T a, T b) { return a != b; });
  // Unsigned arithmetic wraps around, as PTX's does.
  define("add." + type, [](Unsigned a, Unsigned b) { return static_cast<Unsigned>(a + b); });
  define("sub." + type, [](Unsigned a, Unsigned b) { return static_cast<Unsigned>(a - b); });
  define("mul.lo." + type, [](Unsigned a, Unsigned b) { return static_cast<Unsigned>(a * b); });
  define("mad.lo." + type, [](Unsigned a, Unsigned b, Unsigned c) { return static_cast<Unsigned>(a * b + c); });
  if constexpr (sizeof(Wide) > sizeof(T)) {
    define("mul.wide." + type, [](T a, T b) { return static_cast<Wide>(static_cast<Wide>(a) * static_cast<Wide>(b)); });
  }
  define("div." + type, [](T a, T b) { return require_quotient(a, b), static_cast<T>(a / b); });
  define("rem." + type, [](T a, T b) { return require_quotient(a, b), static_cast<T>(a % b); });
  define("min." + type, [](T a, T b) { return a < b ? a : b; });
  define("max." + type, [](T a, T b) { return a > b ? a : b; });
  define("neg." + type, [](Unsigned a) { return static_cast<Unsigned>(0 - a); });
  // Shifts by more than the width are shifts by the width.
  define("shr." + type, [](T a, uint32_t by) {
    constexpr uint32_t kWidth = 8 * sizeof(T);
    return static_cast<T>(by < kWidth ? a >> by : (a >> (kWidth - 1)) >> 1);
  });
}

template <typename T>
void define_bits(const std::string& type) {
  define("and." + type, [](T a, T b) { return static_cast<T>(a & b); });
  define("or." + type, [](T a, T b) { return static_cast<T>(a | b); });
  define("xor." + type, [](T a, T b) { return static_cast<T>(a ^ b); });
  define("not." + type, [](T a) { return static_cast<T>(a ^ static_cast<T>(-1)); });
  if constexpr (!std::is_same_v<T, bool>) {
    define("shl." + type, [](T a, uint32_t by) { return by < 8 * sizeof(T) ? static_cast<T>(a << by) : T(0); });
    define("setp.eq." + type, [](T a, T b) { return a == b; });
    define("setp.ne." + type, [](T a, T b) { return a != b; });
  }
}

template <typename T>
void define_moves(const std::string& type) {
  define("mov." + type, [](T a) { return a; });
  if constexpr (!std::is_same_v<T, bool>) {
    define("selp." + type, [](T a, T b, bool which) { return which ? a : b; });
    table["selp." + type].written = written_if_selected;
  }
}

void define_conversions() {
  define("cvt.f64.f32", [](float a) { return static_cast<double>(a); });
  define("cvt.rn.f32.f64", [](double a) { return canonical(static_cast<float>(a)); });
  define("cvt.rn.f32.s32", [](int32_t a) { return static_cast<float>(a); });
  define("cvt.rn.f32.u32", [](uint32_t a) { return static_cast<float>(a); });
  define("cvt.rn.f64.s32", [](int32_t a) { return static_cast<double>(a); });
  define("cvt.rn.f64.s64", [](int64_t a) { return static_cast<double>(a); });
  define("cvt.s64.s32", [](int32_t a) { return static_cast<int64_t>(a); });
  define("cvt.s64.s32 of 64", [](uint64_t a) { return static_cast<int64_t>(static_cast<int32_t>(a)); });
  define("cvt.u64.u32", [](uint32_t a) { return static_cast<uint64_t>(a); });
  define("cvt.u32.u64", [](uint64_t a) { return static_cast<uint32_t>(a); });
  define("cvt.u32.u16", [](uint16_t a) { return static_cast<uint32_t>(a); });
  define("cvt.u16.u32", [](uint32_t a) { return static_cast<uint16_t>(a); });
  // nan becomes 0.
  define("cvt.sat.f32.f32", [](float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; });
  define("cvt.f32.f16", [](uint16_t a) { return canonical(static_cast<float>(std::bit_cast<_Float16>(a))); });
  define("cvt.rn.f16.f32", [](float a) { return float16_of(a); });
  define("cvt.rn.bf16.f32", [](float a) { return bfloat16_of(a); });
  // The first operand is the upper half.
  define("cvt.rn.f16x2.f32", [](float a, float b) { return static_cast<uint32_t>(float16_of(a)) << 16 | float16_of(b); });
  define("cvt.rn.bf16x2.f32", [](float a, float b) { return static_cast<uint32_t>(bfloat16_of(a)) << 16 | bfloat16_of(b); });
  // Generic addresses of global memory are those of global memory.
  define("cvta.to.global.u64", [](uint64_t a) { return a; });
}

void define_the_rest() {
  define("min.f32", [](float a, float b) { return canonical(b != b || a < b || (a == b && std::signbit(a)) ? a : b); });
  define("min.f64", [](double a, double b) { return canonical(b != b || a < b || (a == b && std::signbit(a)) ? a : b); });
  // The results that the PTX ISA names are exact. Others may be 2 ulp and 1 ulp away from the nearest number.
  define("ex2.approx.ftz.f32", [](float a) {
    const float x = flushed(a);
    if (x != x || x == 0.0f || std::isinf(x)) return canonical(std::exp2(x));
    return flushed(moved(flushed(static_cast<float>(std::exp2(static_cast<double>(x)))), machine.exponential_ulps));
  });
  define("rcp.approx.ftz.f32", [](float a) {
    const float x = flushed(a);
    return canonical(flushed(moved(flushed(1.0f / x), machine.inverse_ulps)));
  });
  define("bfi.b32", [](uint32_t a, uint32_t b, uint32_t from, uint32_t count) {
    const uint64_t mask = ((uint64_t{1} << std::min(count & 255u, 32u)) - 1) << std::min(from & 255u, 32u);
    return static_cast<uint32_t>((b & ~mask) | (uint64_t{a} << std::min(from & 255u, 32u) & mask));
  });
}

// ---- Values of several registers: mov.b32 and mov.b64 with braces, under names of their own

template <typename Whole, typename Part>
void pack(Warp& warp, const Instruction& instruction, uint32_t lanes) {
  for_each_lane(lanes, [&](uint32_t lane) {
    const auto part = [&](int i) { return Whole{warp.at<Part>(instruction.from[i])[lane]}; };
    warp.at<Whole>(instruction.to[0])[lane] = part(0) | part(1) << 8 * sizeof(Part);
  });
}
template <typename Whole, typename Part>
void unpack(Warp& warp, const Instruction& instruction, uint32_t lanes) {
  for_each_lane(lanes, [&](uint32_t lane) {
    const Whole whole = warp.at<Whole>(instruction.from[0])[lane];
    for (int i = 0; i < 2; ++i) warp.at<Part>(instruction.to[i])[lane] = static_cast<Part>(whole >> 8 * sizeof(Part) * i);
  });
}
template <typename Whole, typename Part>
void define_packs(const std::string& type) {
  table["mov." + type + " pack"] = {pack<Whole, Part>, {sizeof(Whole)}, {sizeof(Part), sizeof(Part)}};
  table["mov." + type + " unpack"] = {unpack<Whole, Part>, {sizeof(Part), sizeof(Part)}, {sizeof(Whole)}};
}

// ---- Memory

uint64_t address_of(const Warp& warp, const Instruction& instruction, uint32_t lane) {
  const Slot& base = instruction.from[instruction.from_count - 1];
  if (base.bytes == 8) return warp.at<uint64_t>(base)[lane] + static_cast<uint64_t>(instruction.displacement);
  return static_cast<uint32_t>(warp.at<uint32_t>(base)[lane] + static_cast<uint32_t>(instruction.displacement));
}

// A register that is wider than the type gets the value with its sign; the least significant bytes are first.
template <typename T>
void set_register(const Warp& warp, const Slot& slot, uint32_t lane, T value) {
  using Wide = std::conditional_t<std::is_floating_point_v<T>, T, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;
  const Wide wide = value;
  std::memcpy(warp.at<unsigned char>(slot) + size_t{slot.bytes} * lane, &wide, slot.bytes);
}

// The bits of the i-th value in a mask of bytes.
template <typename T>
constexpr uint32_t bytes_at(int i) {
  return ((1u << sizeof(T)) - 1) << sizeof(T) * i;
}

template <typename T, Space Machine::* space>
void load(Warp& warp, const Instruction& instruction, uint32_t lanes) {
  for_each_lane(lanes, [&](uint32_t lane) {
    const size_t bytes = sizeof(T) * instruction.to_count;
    const auto [p, unwritten] = (machine.*space).load(address_of(warp, instruction, lane), bytes, machine.running(warp, lane));
    for (int i = 0; i < instruction.to_count; ++i) {
      T value;
      std::memcpy(&value, p + sizeof(T) * i, sizeof(T));
      set_register(warp, instruction.to[i], lane, value);
      if ((unwritten & bytes_at<T>(i)) != 0) warp.results[i] &= ~(1u << lane);
    }
  });
}

template <typename T, Space Machine::* space>
void store(Warp& warp, const Instruction& instruction, uint32_t lanes) {
  for_each_lane(lanes, [&](uint32_t lane) {
    const int count = instruction.from_count - 1;
    uint32_t unwritten = 0;
    for (int i = 0; i < count; ++i) {
      if ((written(warp, instruction.from[i]) >> lane & 1) == 0) unwritten |= bytes_at<T>(i);
    }
    const uint64_t address = address_of(warp, instruction, lane);
    unsigned char* const p = (machine.*space).store(address, sizeof(T) * count, unwritten, machine.running(warp, lane));
    for (int i = 0; i < count; ++i) {
      const Slot& from = instruction.from[i];
      std::memcpy(p + sizeof(T) * i, warp.at<unsigned char>(from) + size_t{from.bytes} * lane, sizeof(T));
    }
  });
}

template <typename T>
void define_memory(const std::string& type) {
  for (uint32_t count : {1, 2, 4}) {
    if (count * sizeof(T) > 16) continue;
    const std::string suffix = (count == 1 ? "." : ".v" + std::to_string(count) + ".") + type;
    const std::vector<uint32_t> values(count, sizeof(T));
    std::vector<uint32_t> values_and_address = values;
    values_and_address.push_back(8);
    const auto load_from = [&](Run run) { return Operation{run, values, {8}, Control::kNone, true, true, address_required}; };
    table["ld.param" + suffix] = load_from(load<T, &Machine::parameters>);
    table["ld.global" + suffix] = load_from(load<T, &Machine::global>);
    table["ld.shared" + suffix] = load_from(load<T, &Machine::shared>);
    const Operation store_to{store<T, &Machine::shared>, {}, values_and_address, Control::kNone, true, true, address_required};
    table["st.shared" + suffix] = store_to;
    // Which caches keep a value does not change it.
    for (const char* cache : {"", ".wb", ".cs"}) {
      Operation& operation = table[std::string("st.global") + cache + suffix] = store_to;
      operation.run = store<T, &Machine::global>;
      operation.written = required<0>;
    }
  }
}

// ---- Threads that communicate

template <bool is_bfly>
void exchange(Warp& warp, const Instruction& instruction, uint32_t lanes) {
  const auto* const value = warp.at<uint32_t>(instruction.from[0]);
  std::array<uint32_t, kLanes> result{};
  uint32_t in_range = 0;
  for_each_lane(lanes, [&](uint32_t lane) {
    const auto operand = [&](int i) { return warp.at<uint32_t>(instruction.from[i])[lane]; };
    if (operand(3) != kAllLanes) throw Fault("a shuffle of part of a warp");
    const uint32_t by = operand(1) & 31, segment = operand(2) >> 8 & 31, last = (lane & segment) | (operand(2) & 31 & ~segment);
    uint32_t other = is_bfly ? lane ^ by : lane + by;
    in_range |= static_cast<uint32_t>(other <= last) << lane;
    if (other > last) other = lane;
    if ((lanes >> other & 1) == 0) throw Fault("a shuffle from a lane that has no thread");
    result[lane] = value[other];
    if ((written(warp, instruction.from[0]) >> other & 1) == 0) warp.results[0] &= ~(1u << lane);
  });
  for_each_lane(lanes, [&](uint32_t lane) { warp.at<uint32_t>(instruction.to[0])[lane] = result[lane]; });
  uint32_t& predicate = *warp.at<uint32_t>(instruction.to[1]);
  predicate = (predicate & ~lanes) | in_range;
}

template <bool adds>
void atomic(Warp& warp, const Instruction& instruction, uint32_t lanes) {
  for_each_lane(lanes, [&](uint32_t lane) {
    const uint64_t address = address_of(warp, instruction, lane);
    // It is no store, so it is not ordered with other atomics, and need not be.
    const auto [loaded, unwritten] = machine.global.load(address, sizeof(uint32_t), machine.running(warp, lane));
    if (unwritten != 0) throw Fault("an atomic on what nobody wrote");
    auto* const p = const_cast<unsigned char*>(loaded);
    uint32_t before, operand = warp.at<uint32_t>(instruction.from[0])[lane];
    std::memcpy(&before, p, sizeof(before));
    const uint32_t after = adds ? before + operand : operand;
    std::memcpy(p, &after, sizeof(after));
    warp.at<uint32_t>(instruction.to[0])[lane] = before;
    if (adds) machine.counted.emplace(address, before);
    Thread& thread = warp.threads[lane];
    std::vector<Moment>& released = machine.released[address];
    thread.seen = released;
    const Moment now = machine.running(warp, lane).now;
    if (thread.fenced == now.epoch) released.push_back(now);
  });
}

void fence(Warp& warp, const Instruction&, uint32_t lanes) {
  for_each_lane(lanes, [&](uint32_t lane) {
    Thread& thread = warp.threads[lane];
    const Moment now = machine.running(warp, lane).now;
    thread.fenced = now.epoch;
    for (const Moment& each : thread.seen) machine.known[each.block] = {each, now};
    thread.seen.clear();
  });
}

void barrier(Warp& warp, const Instruction& instruction, uint32_t lanes) {
  for_each_lane(lanes, [&](uint32_t lane) {
    if (warp.at<uint32_t>(instruction.from[0])[lane] != 0) throw Fault("a barrier other than 0");
  });
}

Table made() {
  define_numbers<float>("f32");
  define_numbers<double>("f64");
  define_integers<int16_t, int32_t>("s16");
  define_integers<uint16_t, uint32_t>("u16");
  define_integers<int32_t, int64_t>("s32");
  define_integers<uint32_t, uint64_t>("u32");
  define_integers<int64_t, int64_t>("s64");
  define_integers<uint64_t, uint64_t>("u64");
  define_bits<bool>("pred");
  define_bits<uint16_t>("b16");
  define_bits<uint32_t>("b32");
  define_bits<uint64_t>("b64");
  define_moves<bool>("pred");
  for (const char* type : {"b16", "u16", "s16"}) define_moves<uint16_t>(type);
  for (const char* type : {"b32", "u32", "s32"}) define_moves<uint32_t>(type);
  for (const char* type : {"b64", "u64", "s64"}) define_moves<uint64_t>(type);
  define_moves<float>("f32");
  define_moves<double>("f64");
  define_conversions();
  define_the_rest();
  define_packs<uint32_t, uint16_t>("b32");
  define_packs<uint64_t, uint32_t>("b64");
  define_memory<uint8_t>("u8");
  define_memory<int8_t>("s8");
  define_memory<uint16_t>("u16");
  define_memory<uint32_t>("u32");
  define_memory<int32_t>("s32");
  define_memory<uint64_t>("u64");
  define_memory<float>("f32");
  define_memory<double>("f64");
  table["shfl.sync.down.b32"] = {exchange<false>, {4, 0}, {4, 4, 4, 4}, Control::kWholeWarp, false, false, required<1>};
  table["shfl.sync.bfly.b32"] = {exchange<true>, {4, 0}, {4, 4, 4, 4}, Control::kWholeWarp, false, false, required<1>};
  table["atom.global.add.u32"] = {atomic<true>, {4}, {4, 8}, Control::kNone, false, true, required<0>};
  table["atom.global.exch.b32"] = {atomic<false>, {4}, {4, 8}, Control::kNone, false, true, required<0>};
  table["membar.gl"] = {fence, {}, {}};
  table["bar.sync"] = {barrier, {}, {4}, Control::kBarrier, false, false, required<0>};
  table["bra"] = {nullptr, {}, {}, Control::kBranch};
  table["bra.uni"] = {nullptr, {}, {}, Control::kUniformBranch};
  table["ret"] = {nullptr, {}, {}, Control::kExit};
  table["and.pred"].written = written_or_decided<false>;
  table["or.pred"].written = written_or_decided<true>;
  return std::move(table);
}

}  // namespace

const Operation* operation_of(const std::string& opcode) {
  static const Table operations = made();
  const auto found = operations.find(opcode);
  return found == operations.end() ? nullptr : &found->second;
}

}  // namespace ptx
