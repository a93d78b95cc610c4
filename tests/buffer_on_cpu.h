// SPDX-License-Identifier: Apache-2.0
// Memory of a kernel that runs on the CPU: filled with garbage, `offset` bytes off its alignment,
// and ending where its allocation ends, so that an overrun meets a red zone of the address
// sanitizer.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

class Buffer {
 public:
  Buffer(std::size_t size, std::size_t offset)
      : size_(size),
        offset_(offset),
        memory_(new (std::align_val_t{64}) unsigned char[size + offset]) {
    std::memset(memory_, kGarbage, size + offset);
  }
  ~Buffer() { ::operator delete[](memory_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // Whether the bytes before `data` are still garbage; the sanitizer sees only those after it.
  bool unharmed_before() const {
    for (std::size_t at = 0; at < offset_; ++at) {
      if (memory_[at] != kGarbage) return false;
    }
    return true;
  }
  unsigned char* data() { return memory_ + offset_; }
  void read() {
    if (std::fread(data(), 1, size_, stdin) != size_) std::exit(2);
  }
  void write() { std::fwrite(data(), 1, size_, stdout); }

 private:
  static constexpr unsigned char kGarbage = 0xA5;
  std::size_t size_;
  std::size_t offset_;
  unsigned char* memory_;
};
