// Kernels in anonymous namespaces are not among a library's dynamic symbols, so that dladdr() alone
// does not know them: their names are read from the file's symbol table, once something went wrong.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>

#include <fstream>
#include <iterator>
#include <vector>

#include "emulator.h"

namespace emulator {
namespace {

std::string demangled(const char* symbol) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> name(
      abi::__cxa_demangle(symbol, nullptr, nullptr, &status), free);
  return status == 0 ? name.get() : symbol;
}

template <class T>
const T* at(const std::vector<char>& file, size_t offset, size_t count = 1) {
  if (offset + count * sizeof(T) > file.size()) throw std::out_of_range("a damaged library");
  return reinterpret_cast<const T*>(file.data() + offset);
}

std::string symbol_at(const std::vector<char>& file, Elf64_Addr address) {
  const auto* header = at<Elf64_Ehdr>(file, 0);
  const auto* sections = at<Elf64_Shdr>(file, header->e_shoff, header->e_shnum);
  for (int s = 0; s < header->e_shnum; ++s) {
    if (sections[s].sh_type != SHT_SYMTAB) continue;
    const size_t count = sections[s].sh_size / sizeof(Elf64_Sym);
    const auto* symbols = at<Elf64_Sym>(file, sections[s].sh_offset, count);
    const size_t names = sections[sections[s].sh_link].sh_offset;
    for (size_t i = 0; i < count; ++i) {
      if (symbols[i].st_value == address && ELF64_ST_TYPE(symbols[i].st_info) == STT_FUNC) {
        return demangled(at<char>(file, names + symbols[i].st_name));
      }
    }
  }
  return "without a name";
}

}  // namespace

std::string kernel_name(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info)) return "without a name";
  std::ifstream stream(info.dli_fname, std::ios::binary);
  const std::vector<char> file{std::istreambuf_iterator<char>(stream), {}};
  return symbol_at(file, uintptr_t(kernel) - uintptr_t(info.dli_fbase));
}

}  // namespace emulator
