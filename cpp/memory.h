// Aligned memory that is taken once, at load: weights, KV cache, activations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace fulcrum {

// Zeroed anonymous memory, page aligned, huge pages where the kernel grants them. Pages that are
// never written cost nothing, so that a cache can be reserved larger than what is used of it.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes);  // throws std::bad_alloc
  ~Buffer();
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  void swap(Buffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace fulcrum
