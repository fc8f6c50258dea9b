// Selects the instruction set whose kernels run.
#pragma once
#include <string>
#include <vector>

#include "kernel_table.h"

namespace divqat {

// The best one that this machine supports, or the one chosen with use_instruction_set().
const InstructionSet& instruction_set();
// Names of those that this machine supports, best first.
std::vector<std::string> instruction_sets();
// Throws std::invalid_argument for a name that is not among them.
void use_instruction_set(const std::string& name);

}  // namespace divqat
