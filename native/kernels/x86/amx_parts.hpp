// The AMX kernels, and whether they run.
#pragma once

#include "kernels/kernels.hpp"

namespace entrollm {

// Whether the processor has AMX with int8 products and the system lets this process use it.
bool runs_amx();

std::size_t cascade_panels(const CascadeRun& run, std::uint8_t* panels);
void panel_product(const PanelProduct& product);
std::size_t cascade_digit_groups(const CascadeRun& run, const FusedPanelProduct& product);

}  // namespace entrollm
