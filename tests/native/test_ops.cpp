// The arithmetic between the products in buffers of exactly the size it may touch, with every
// instruction set and the same bits.
#include <algorithm>

#include "kernels/float_kernels.hpp"
#include "support.hpp"

using namespace entrollm;
using namespace entrollm::test;

namespace {

// Heap memory of exactly `size` floats, for AddressSanitizer to guard.
using Floats = std::unique_ptr<float[]>;

Floats random_floats(Random& random, std::size_t size) {
  Floats floats(new float[size]);
  for (std::size_t i = 0; i < size; ++i) {
    floats[i] = static_cast<float>(random.byte()) / 64.0f - 2.0f;
  }
  return floats;
}

// Runs `body(kernels, out)` on copies of `out` with every instruction set; results must be equal.
template <class Body>
void agree(const char* what, const Floats& out, std::size_t size, Body body) {
  std::vector<float> expected;
  static const std::vector<const Kernels*> kKernels = all_kernels();
  for (const Kernels* isa : kKernels) {
    const Floats found(new float[size]);
    std::copy_n(out.get(), size, found.get());
    body(*isa->floats, found.get());
    if (expected.empty()) expected.assign(found.get(), found.get() + size);
    require(std::memcmp(expected.data(), found.get(), size * sizeof(float)) == 0,
            std::string(what) + " with " + isa->name);
  }
}

void check_elementwise(Random& random) {
  const std::size_t count = 1 + random.below(100);
  const Floats x = random_floats(random, count), y = random_floats(random, count);
  agree("rms_norm", x, count, [&](const FloatKernels& floats, float* out) {
    floats.rms_norm(x.get(), y.get(), count, 1e-5f, out);
  });
  agree("swiglu", x, count, [&](const FloatKernels& floats, float* out) {
    floats.swiglu(x.get(), y.get(), count, out);
  });
  agree("geglu", x, count, [&](const FloatKernels& floats, float* out) {
    floats.geglu(x.get(), y.get(), count, out);
  });
  agree("rotate", x, count, [&](const FloatKernels& floats, float* out) {
    floats.rotate(out, y.get(), y.get() + count - count / 2, count / 2);
  });
}

void check_attention(Random& random) {
  const std::size_t rows = 1 + random.below(kAttentionRows);
  const std::size_t head_dim = 1 + random.below(100);
  const std::size_t length = rows + random.below(random.coin() ? 20 : 200);
  const Floats queries = random_floats(random, rows * head_dim);
  const Floats keys = random_floats(random, head_dim * length);
  const Floats values = random_floats(random, head_dim * length);
  AttentionTile tile{};
  tile.rows = rows;
  tile.head_dim = head_dim;
  tile.scale = 0.125f;
  tile.keys = keys.get();
  tile.key_stride = length;
  tile.values = values.get();
  for (std::size_t row = 0; row < rows; ++row) {
    tile.queries[row] = queries.get() + row * head_dim;
    tile.lasts[row] = length - rows + row + 1;
    tile.firsts[row] = random.coin() ? 0 : random.below(tile.lasts[row]);
  }
  const Floats scratch(new float[attention_scratch(length)]);
  tile.scratch = scratch.get();
  const Floats before = random_floats(random, rows * head_dim);
  agree("attend", before, rows * head_dim, [&](const FloatKernels& floats, float* out) {
    for (std::size_t row = 0; row < rows; ++row) tile.outputs[row] = out + row * head_dim;
    floats.attend(tile);
  });
}

}  // namespace

int main() {
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    Random random(seed);
    check_elementwise(random);
    check_attention(random);
  }
  std::puts("ops: all instruction sets agree");
}
