// Aligned memory that is taken once, at load: weights, KV cache, activations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

namespace fulcrum {

// Zeroed anonymous memory, page aligned; from 2 MiB on aligned to huge pages, which the kernel is
// asked for. Pages that are never written cost nothing, so that a cache can be reserved larger than
// what is used of it.
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

  // Gives the bytes from `offset` on their memory now instead of at the first write to each page,
  // where the system can do that. Keeps what they hold.
  void populate(size_t offset, size_t bytes) const;

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  void swap(Buffer& other) noexcept {
    std::swap(mapping_, other.mapping_);
    std::swap(mapping_bytes_, other.mapping_bytes_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  void* mapping_ = nullptr;
  size_t mapping_bytes_ = 0;
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

// Many matrices side by side in few large buffers: most are smaller than a huge page, and a step
// that reads them from small pages spends a good part of its time on address translation.
class Arena {
 public:
  // Zeroed, 64-byte aligned memory that lives as long as the arena. Callable from several threads.
  uint8_t* take(size_t bytes);

 private:
  std::mutex mutex_;
  std::vector<Buffer> chunks_;
  size_t used_bytes_ = 0;  // of the last chunk
};

}  // namespace fulcrum
