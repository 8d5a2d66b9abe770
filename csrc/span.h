// A pointer into memory that the caller owns, with the size of that memory.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace otalign {

// The CPU engine checks `bytes` before it reads or writes. Everywhere else a Span is used as a plain pointer.
template <class T>
struct Span {
  T* data = nullptr;
  int64_t bytes = 0;

  Span() = default;
  Span(T* address, int64_t size = 0) : data(address), bytes(size) {}
  OTALIGN_ANYWHERE operator T*() const { return data; }
  template <class U>
  OTALIGN_ANYWHERE explicit operator U*() const {
    return static_cast<U*>(data);
  }
};

}  // namespace otalign
