// What every kernel needs, whatever the layout of its matrix.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int kLanes = 32;
constexpr int kTileRows = 16;
// Matrices that one launch multiplies.
constexpr int kMaxMatrices = 4;
// Neighbours that a lane decodes, converts and writes together.
constexpr int kPieceColumns = 8;

// Divides by a number that the host has inverted, because conversions and reciprocals run on a slow
// unit. Dividend times divisor must be below 2^31.
struct Divisor {
  int value;
  u32 inverse;  // 2^31 / value, rounded up

  __device__ __forceinline__ operator int() const { return value; }
  __device__ __forceinline__ int divide(int x) const { return __umulhi(2 * x, inverse); }
};

// A row of a tile.
struct Row {
  int index;  // in the matrix
  float scale;
  float offset;
};

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Makes what this thread saw or wrote visible to threads of its block that synchronize with it
// afterwards.
__device__ __forceinline__ void fence_block() { asm volatile("fence.acq_rel.cta;" ::: "memory"); }

// Waits until the previous kernel of the stream has ended, where this one may begin before that.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream begin, where it may begin before this one ends.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Four activations as they are stored.
template <int kStoredType>
struct Stored {
  using Bits = uint2;

  __device__ static __forceinline__ float4 values(uint2 bits) {
    return make_float4(value(bits.x), value(bits.x >> 16), value(bits.y), value(bits.y >> 16));
  }

  __device__ static __forceinline__ float value(u32 bits) {
    if constexpr (kStoredType == 1) return __uint_as_float(bits << 16);
    float value;
    asm("{\n .reg .b16 h;\n mov.b16 h, %1;\n cvt.f32.f16 %0, h;\n}"
        : "=f"(value)
        : "h"(static_cast<u16>(bits)));
    return value;
  }
};

template <>
struct Stored<0> {
  using Bits = float4;
  __device__ static __forceinline__ float4 values(float4 bits) { return bits; }
};

// Stores a value in the type of the output: 0 float32, 1 bfloat16, 2 float16.
__device__ __forceinline__ void store_value(void* out, long long at, float value, int type) {
  if (type == 0) {
    static_cast<float*>(out)[at] = value;
    return;
  }
  u16 bits;
  if (type == 1) {
    asm("{\n .reg .b16 h;\n cvt.rn.bf16.f32 h, %1;\n mov.b16 %0, h;\n}" : "=h"(bits) : "f"(value));
  } else {
    asm("{\n .reg .b16 h;\n cvt.rn.f16.f32 h, %1;\n mov.b16 %0, h;\n}" : "=h"(bits) : "f"(value));
  }
  static_cast<u16*>(out)[at] = bits;
}

// Stores eight neighbours, the first at a multiple of eight, past the first-level cache.
template <int kType>
__device__ __forceinline__ void store_piece(u8* out, const float (&values)[kPieceColumns]) {
  uint4* to = reinterpret_cast<uint4*>(out);
  if constexpr (kType == 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      __stcs(to + i,
             make_uint4(__float_as_uint(values[4 * i]), __float_as_uint(values[4 * i + 1]),
                        __float_as_uint(values[4 * i + 2]), __float_as_uint(values[4 * i + 3])));
    }
  } else {
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kType == 1) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;"
            : "=r"(words[i])
            : "f"(values[2 * i + 1]), "f"(values[2 * i]));
      } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;"
            : "=r"(words[i])
            : "f"(values[2 * i + 1]), "f"(values[2 * i]));
      }
    }
    __stcs(to, make_uint4(words[0], words[1], words[2], words[3]));
  }
}

// Computes the weights of eight neighbours: symbol * scale, rounded, + offset.
__device__ __forceinline__ void scale_piece(uint2 bytes, float scale, float offset,
                                            float (&values)[kPieceColumns]) {
  constexpr float kLift = 8388608.0f;
  // The bits of 2^23 + byte are assembled directly. Subtracting 2^23 * scale in the same fused
  // operation leaves one rounding.
  const float lifted = -kLift * scale;
#pragma unroll
  for (int i = 0; i < kPieceColumns; ++i) {
    const u32 bits =
        __byte_perm(i < 4 ? bytes.x : bytes.y, __float_as_uint(kLift), 0x7440u + i % 4);
    values[i] = __fadd_rn(__fmaf_rn(__uint_as_float(bits), scale, lifted), offset);
  }
}
