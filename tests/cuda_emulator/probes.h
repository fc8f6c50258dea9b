// Small kernels that show what the emulator does, for its own tests.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

// Runs the named probe; what it wrote.
std::vector<int64_t> probe(const std::string& name);
