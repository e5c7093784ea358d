// Memory for numbers and vectors.

#include <cstdlib>
#include <vector>

namespace {

// It grows, is never filled beforehand, and begins at a cache line. No operator new: that for such alignments is younger than
// the C++ libraries that a prebuilt kernel should run with.
template <class T>
class Buffer {
    void* whole = nullptr;
    T* data = nullptr;
    int64_t size = 0;

  public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    ~Buffer() { std::free(whole); }

    T* fit(int64_t count) {
        if (count <= size) return data;
        std::free(whole);
        whole = std::malloc(count * sizeof(T) + 64);
        if (!whole) std::abort();  // what an exception out of a thread would end in
        data = (T*)(((uintptr_t)whole + 63) / 64 * 64), size = count;
        return data;
    }
    T* at(int64_t place) { return data + place; }
    const T* at(int64_t place) const { return data + place; }
    T& operator[](int64_t place) { return data[place]; }
    void clear() { std::memset(static_cast<void*>(data), 0, size * sizeof(T)); }
};

}  // namespace
