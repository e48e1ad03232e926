// The mask of a vector as bits in memory, one bit for each lane.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "cpu/vector.h"

namespace gradkernels::cpu {
namespace {

template <typename T>
GK_INLINE typename Vec<T>::Mask from_bits(uint32_t bits) {
  using V = Vec<T>;
  using Integer = typename IntegerOf<T>::type;
  typename V::Bits lane_bit;
  for (int lane = 0; lane < V::kRegisterLanes; ++lane) lane_bit[lane] = Integer(1) << lane;
  typename V::Mask mask;
  for (int i = 0; i < V::kRegisters; ++i) {
    const typename V::Bits part = static_cast<Integer>(bits >> (i * V::kRegisterLanes)) - typename V::Bits{};
    mask.part[i] = (part & lane_bit) != 0;
  }
  return mask;
}

// kLanes / 8 bytes, the lowest bits first.
template <typename T>
GK_INLINE void store_bits(uint8_t* target, AllLanes, typename Vec<T>::Mask mask) {
  const uint32_t bits = to_bits<T>(mask);
  target[0] = static_cast<uint8_t>(bits);
  if constexpr (Vec<T>::kLanes == 16) target[1] = static_cast<uint8_t>(bits >> 8);
}
template <typename T>
GK_INLINE typename Vec<T>::Mask load_bits(const uint8_t* source, AllLanes) {
  uint32_t bits = source[0];
  if constexpr (Vec<T>::kLanes == 16) bits |= static_cast<uint32_t>(source[1]) << 8;
  return from_bits<T>(bits);
}

// The bits of the first lanes, in whole bytes; unused bits are 0.
template <typename T>
GK_INLINE void store_bits(uint8_t* target, SomeLanes lanes, typename Vec<T>::Mask mask) {
  const uint32_t bits = to_bits<T>(mask) & ((1u << lanes.count) - 1u);
  target[0] = static_cast<uint8_t>(bits);
  if (lanes.count > 8) target[1] = static_cast<uint8_t>(bits >> 8);
}
template <typename T>
GK_INLINE typename Vec<T>::Mask load_bits(const uint8_t* source, SomeLanes lanes) {
  uint32_t bits = source[0];
  if (lanes.count > 8) bits |= static_cast<uint32_t>(source[1]) << 8;
  return from_bits<T>(bits);
}

}  // namespace
}  // namespace gradkernels::cpu
