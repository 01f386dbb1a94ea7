// Chooses the instantiation of a template by a number that is known only at run time.
#pragma once

#include <utility>

namespace entrollm {
namespace {  // every instruction set compiles its own

// What Make().operator()<First>() to Make().operator()<Last>() return.
template <int First, int Last, class Make>
struct Instantiations {
  using Function = decltype(Make().template operator()<First>());
  Function function[Last - First + 1];

  template <int... Offset>
  explicit constexpr Instantiations(std::integer_sequence<int, Offset...>)
      : function{Make().template operator()<First + Offset>()...} {}
};

// The function pointer that Make().operator()<value>() returns; Make is a lambda without captures.
// `value` must be between First and Last. Widths are: class Code has checked them.
template <int First, int Last, class Make>
[[gnu::always_inline]] inline auto instantiation(int value, Make) {
  static constexpr Instantiations<First, Last, Make> kTable(
      std::make_integer_sequence<int, Last - First + 1>{});
  return kTable.function[value - First];
}

}  // namespace
}  // namespace entrollm
