// The AMX kernels. Their table is made in dispatch.cpp: a table that copies another one is filled
// in by code, which in a file compiled for AVX-512 would run on every processor when the module
// loads.
#pragma once

#include "kernels/kernels.hpp"

namespace entrollm {

// Whether the processor has AMX with int8 products and the system lets this process use it.
bool runs_amx();

std::size_t cascade_panels(const CascadeRun& run, std::uint8_t* panels);
std::size_t cascade_groups(const CascadeRun& run, const GroupProduct& product);
void panel_product(const PanelProduct& product);

}  // namespace entrollm
