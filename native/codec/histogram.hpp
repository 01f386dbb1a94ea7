// How often each symbol occurs.
#pragma once

#include <cstddef>
#include <cstdint>

namespace entrollm {

// Adds `size` symbols to their counts.
void add_to_histogram(const std::uint8_t* symbols, std::size_t size, std::uint64_t (&counts)[256]);

}  // namespace entrollm
