// Selects the instruction set whose kernels run.
#include "instruction_set.h"

#include <atomic>
#include <stdexcept>

namespace divqat {
namespace {

const InstructionSet* find(const std::string& name) {
  for (const InstructionSet* set : {kAvx512, kAvx2, kPortable}) {
    if (set && set->runs_here() && (name.empty() || name == set->name)) return set;
  }
  return nullptr;
}

std::atomic<const InstructionSet*>& current() {
  static std::atomic<const InstructionSet*> set{find("")};
  return set;
}

}  // namespace

const InstructionSet& instruction_set() { return *current().load(std::memory_order_relaxed); }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet* set : {kAvx512, kAvx2, kPortable}) {
    if (set && set->runs_here()) names.push_back(set->name);
  }
  return names;
}

void use_instruction_set(const std::string& name) {
  const InstructionSet* set = name.empty() ? nullptr : find(name);
  if (!set) {
    std::string wanted;
    for (const auto& known : instruction_sets()) wanted += (wanted.empty() ? "" : ", ") + known;
    throw std::invalid_argument("name: wanted one of " + wanted + ", got " + name);
  }
  current().store(set, std::memory_order_relaxed);
}

}  // namespace divqat
