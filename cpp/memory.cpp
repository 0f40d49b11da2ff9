#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <new>

namespace fulcrum {
namespace {

constexpr size_t kHugePageBytes = size_t{2} << 20;
constexpr size_t kChunkBytes = size_t{32} << 20;

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

Buffer::Buffer(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  const bool is_large = bytes >= kHugePageBytes;
  mapping_bytes_ = is_large ? round_up(bytes, kHugePageBytes) + kHugePageBytes : bytes;
  void* p = mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  mapping_ = p;
  data_ = static_cast<uint8_t*>(p);
  if (is_large) {
    data_ +=
        round_up(reinterpret_cast<uintptr_t>(p), kHugePageBytes) - reinterpret_cast<uintptr_t>(p);
    // Advice only: a kernel without transparent huge pages refuses it, and small pages do as well.
    madvise(data_, round_up(bytes, kHugePageBytes), MADV_HUGEPAGE);
  }
}

Buffer::~Buffer() {
  if (mapping_ != nullptr) munmap(mapping_, mapping_bytes_);
}

void Buffer::populate(size_t offset, size_t bytes) const {
#ifdef MADV_POPULATE_WRITE
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data_ + offset) / page * page;
  const uintptr_t end = reinterpret_cast<uintptr_t>(data_ + std::min(offset + bytes, bytes_));
  if (begin >= end) return;
  // Advice only, as above: pages that are not there yet come with their first write.
  madvise(reinterpret_cast<void*>(begin), round_up(end - begin, page), MADV_POPULATE_WRITE);
#endif
}

uint8_t* Arena::take(size_t bytes) {
  const size_t size = round_up(bytes, 64);
  const std::lock_guard lock(mutex_);
  if (chunks_.empty() || used_bytes_ + size > chunks_.back().bytes()) {
    chunks_.emplace_back(size > kChunkBytes ? size : kChunkBytes);
    used_bytes_ = 0;
  }
  uint8_t* memory = chunks_.back().data() + used_bytes_;
  used_bytes_ += size;
  return memory;
}

}  // namespace fulcrum
