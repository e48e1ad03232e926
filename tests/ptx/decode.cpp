// From PTX's text to a Kernel: registers and immediates become slots, labels become places in the code. What it does
// not know fails by its name, and so does an operand whose size is not that of the opcode's type.
#include <charconv>
#include <map>
#include <string_view>
#include <utility>

#include "machine.h"

namespace ptx {
namespace {

using std::string;
using std::string_view;

constexpr uint32_t kAlignment = 64;

string_view trimmed(string_view text) {
  const auto first = text.find_first_not_of(" \t\n\r");
  return first == string_view::npos ? string_view() : text.substr(first, text.find_last_not_of(" \t\n\r") - first + 1);
}

// Cuts off the text up to `end`, and what is between them.
string_view cut(string_view& text, string_view end) {
  const auto at = text.find(end);
  if (at == string_view::npos) throw Fault("no '" + string(end) + "' in: " + string(text.substr(0, 80)));
  const string_view before = text.substr(0, at);
  text.remove_prefix(at + end.size());
  return before;
}

template <typename T>
T number(string_view digits, int base = 10) {
  T value{};
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value, base);
  if (error != std::errc() || end != digits.data() + digits.size()) throw Fault("not a number: " + string(digits));
  return value;
}

// A value of 0 bytes is a predicate.
uint32_t bytes_of_type(string_view type) {
  if (type == "pred") return 0;
  for (const auto& [name, bytes] : {std::pair{"16", 2u}, {"32", 4u}, {"64", 8u}}) {
    if (type.size() == 3 && type.substr(1) == name && string_view("bfus").find(type[0]) != string_view::npos) return bytes;
  }
  throw Fault("unknown type of a register: " + string(type));
}

// An operand as it is written: one name, or several in braces or around a bar; or an address.
struct Operand {
  std::vector<string_view> parts;
  bool is_address = false;
  int64_t displacement = 0;
};

std::vector<Operand> operands_of(string_view text) {
  std::vector<Operand> operands;
  for (text = trimmed(text); !text.empty(); text = trimmed(text)) {
    Operand operand;
    if (text[0] == '[') {
      text.remove_prefix(1);
      string_view address = cut(text, "]");
      operand.is_address = true;
      const auto plus = address.find('+');
      if (plus != string_view::npos) operand.displacement = number<int64_t>(trimmed(address.substr(plus + 1)));
      operand.parts = {trimmed(address.substr(0, plus))};
    } else {
      const bool braces = text[0] == '{';
      if (braces) text.remove_prefix(1);
      string_view parts = braces ? cut(text, "}") : text.substr(0, text.find(','));
      if (!braces) text.remove_prefix(parts.size());
      const char* const separators = braces ? "," : "|";
      while (true) {
        const auto end = parts.find(separators[0]);
        operand.parts.push_back(trimmed(parts.substr(0, end)));
        if (end == string_view::npos) break;
        parts.remove_prefix(end + 1);
      }
    }
    operands.push_back(std::move(operand));
    text = trimmed(text);
    if (!text.empty() && text[0] != ',') throw Fault("not a list of operands: " + string(text));
    if (!text.empty()) text.remove_prefix(1);
  }
  return operands;
}

class Decoder {
 public:
  explicit Decoder(const string& text) : text_(text) {}

  Kernel kernel() {
    string_view rest = text_;
    kernel_.name = trimmed(cut(rest, "("));
    parameters(cut(rest, ")"));
    limits(cut(rest, "{"));
    body(rest);
    for (auto& [instruction, label] : branches_) {
      const auto found = labels_.find(label);
      if (found == labels_.end()) throw Fault("no label " + label);
      kernel_.code[instruction].target = found->second;
    }
    return std::move(kernel_);
  }

 private:
  // Each is `.param .u64 name` or `.param .align 8 .b8 name[bytes]`.
  void parameters(string_view text) {
    while (!(text = trimmed(text)).empty()) {
      string_view one = trimmed(text.substr(0, text.find(',')));
      text.remove_prefix(std::min(text.size(), text.find(',') == string_view::npos ? text.size() : text.find(',') + 1));
      string_view name = one.substr(one.rfind(' ') + 1), type = one.substr(string_view(".param .").size());
      size_t bytes;
      if (type.substr(0, 5) == "align") {
        string_view brackets = name;
        name = cut(brackets, "[");
        bytes = number<size_t>(cut(brackets, "]"));
      } else {
        type = type.substr(0, type.find(' '));
        bytes = type == "u8" || type == "s8" ? 1 : bytes_of_type(type);
      }
      kernel_.parameter_bytes.push_back(bytes);
      symbols_[string(name)] = kernel_.parameter_bytes.size() * kParameterStride;
    }
  }

  // Between the parameters and the code.
  void limits(string_view text) {
    while (!(text = trimmed(text)).empty()) {
      string_view line = text.substr(0, text.find('\n'));
      text.remove_prefix(line.size());
      const string_view name = cut(line, " ");
      if (name == ".maxntid") {
        kernel_.most_threads = number<uint32_t>(trimmed(cut(line, ",")));
        if (trimmed(line) != "1, 1") throw Fault("a block of two dimensions");
      } else if (name != ".minnctapersm") {
        throw Fault("unknown directive " + string(name));
      }
    }
  }

  void body(string_view text) {
    while (!(text = trimmed(text)).empty()) {
      // Braces around the assembler of the sources declare nothing.
      if (text[0] == '{' || text[0] == '}') {
        text.remove_prefix(1);
        continue;
      }
      if (text[0] == '$') {
        labels_[string(cut(text, ":"))] = static_cast<uint32_t>(kernel_.code.size());
        continue;
      }
      const string_view statement = cut(text, ";");
      if (statement.substr(0, 5) == ".reg ") {
        registers(statement.substr(5));
      } else if (statement.substr(0, 8) != ".pragma ") {
        try {
          instruction(statement);
        } catch (const Fault& fault) {
          throw Fault(string(fault.what()) + ", in: " + string(statement));
        }
      }
    }
  }

  // `.f32 %f<1694>`: %f0 to %f1693.
  void registers(string_view text) {
    const uint32_t bytes = bytes_of_type(trimmed(cut(text, " ")).substr(1));
    const string prefix(trimmed(cut(text, "<")));
    const auto count = number<uint32_t>(cut(text, ">"));
    std::vector<Slot>& slots = registers_[prefix];
    if (!slots.empty()) throw Fault("registers " + prefix + " are declared twice");
    for (uint32_t i = 0; i < count; ++i) slots.push_back(new_slot(bytes));
  }

  Slot new_slot(uint32_t bytes) {
    const Slot slot{kernel_.frame_bytes, kernel_.slots++, bytes};
    kernel_.frame_bytes += bytes == 0 ? 4 : bytes * kLanes;
    if (bytes != 0) kernel_.frame_bytes = (kernel_.frame_bytes + kAlignment - 1) / kAlignment * kAlignment;
    return slot;
  }

  Slot constant(uint64_t bits, uint32_t bytes) {
    const auto [found, is_new] = constants_.try_emplace({bits, bytes});
    if (is_new) {
      found->second = new_slot(bytes);
      kernel_.constants.push_back({found->second, bits});
    }
    return found->second;
  }

  Slot register_slot(string_view name) {
    const auto digit = name.find_first_of("0123456789");
    const auto found = registers_.find(string(name.substr(0, digit)));
    if (digit != string_view::npos && found != registers_.end()) {
      const auto place = number<size_t>(name.substr(digit));
      if (place < found->second.size()) return found->second[place];
    }
    throw Fault("unknown register " + string(name));
  }

  // A register, an immediate, a symbol or a special register as a source of `bytes` bytes.
  Slot source(string_view name, uint32_t bytes, bool widens) {
    if (name[0] == '%' && name.find('.') != string_view::npos) {
      const auto [found, is_new] = kernel_.special.try_emplace(string(name));
      if (is_new) found->second = new_slot(4);
      return checked(found->second, bytes, widens, name);
    }
    if (name[0] == '%') return checked(register_slot(name), bytes, widens, name);
    const auto symbol = symbols_.find(string(name));
    if (symbol != symbols_.end()) return constant(symbol->second, bytes);
    if (name.size() == 10 && name.substr(0, 2) == "0f" && bytes == 4) return constant(number<uint32_t>(name.substr(2), 16), bytes);
    if (name.size() == 18 && name.substr(0, 2) == "0d" && bytes == 8) return constant(number<uint64_t>(name.substr(2), 16), bytes);
    const auto value = number<int64_t>(name);
    if (bytes != 8 && bytes != 0 && (value >> 8 * bytes) != 0 && (value >> (8 * bytes - 1)) != -1)
      throw Fault("too large: " + string(name));
    return constant(static_cast<uint64_t>(value), bytes);
  }

  static Slot checked(const Slot& slot, uint32_t bytes, bool widens, string_view name) {
    if (slot.bytes == bytes || (widens && bytes != 0 && slot.bytes > bytes)) return slot;
    throw Fault("a register of another size: " + string(name));
  }

  void instruction(string_view statement) {
    Instruction result{};
    result.text = string(statement);
    result.begin = static_cast<size_t>(statement.data() - text_.data());
    if (statement[0] == '@') {
      string_view guard = trimmed(cut(statement, " ")).substr(1);
      result.is_guarded = true;
      result.guard_is_negated = guard[0] == '!';
      if (result.guard_is_negated) guard.remove_prefix(1);
      result.guard = checked(register_slot(guard), 0, false, guard);
      statement = trimmed(statement);
    }
    const auto end = std::min(statement.size(), statement.find_first_of(" \t\n"));
    string opcode(statement.substr(0, end));
    const std::vector<Operand> operands = operands_of(statement.substr(end));
    if (opcode.substr(0, 4) == "mov." && operands.size() == 2) {
      if (operands[0].parts.size() == 2) opcode += " unpack";
      if (operands[1].parts.size() == 2) opcode += " pack";
    }
    // A conversion from integers may read a wider register.
    if (opcode == "cvt.s64.s32" && operands.size() == 2 && register_slot(operands[1].parts[0]).bytes == 8) opcode += " of 64";
    const Operation* const operation = result.operation = operation_of(opcode);
    if (operation == nullptr) throw Fault("unknown opcode " + opcode);
    if (operation->control == Control::kBranch || operation->control == Control::kUniformBranch) {
      branches_.emplace_back(kernel_.code.size(), string(operands.at(0).parts.at(0)));
      kernel_.code.push_back(std::move(result));
      return;
    }
    // Results first, then sources, an address last.
    std::vector<string_view> parts;
    const Operand* address = nullptr;
    for (const Operand& operand : operands) {
      if (operand.is_address) {
        address = &operand;
      } else {
        parts.insert(parts.end(), operand.parts.begin(), operand.parts.end());
      }
    }
    const size_t count = operation->to.size() + operation->from.size() - operation->addresses;
    if (parts.size() != count || (address != nullptr) != operation->addresses) throw Fault("another number of operands");
    for (const string_view part : parts) {
      const size_t place = result.to_count + result.from_count;
      if (place < operation->to.size()) {
        result.to[result.to_count++] = checked(register_slot(part), operation->to[place], operation->widens, part);
      } else {
        result.from[result.from_count] = source(part, operation->from[place - operation->to.size()], operation->widens);
        ++result.from_count;
      }
    }
    if (address != nullptr) {
      const string_view base = address->parts[0];
      const Slot slot = base[0] == '%' ? register_slot(base) : source(base, 8, false);
      // Shared memory has addresses of 32 bits too.
      if (slot.bytes != 8 && (slot.bytes != 4 || opcode.find(".shared") == string::npos))
        throw Fault("a register of another size: " + string(base));
      result.from[result.from_count++] = slot;
      result.displacement = address->displacement;
    }
    kernel_.code.push_back(std::move(result));
  }

  const string text_;
  Kernel kernel_;
  std::unordered_map<string, uint64_t> symbols_{{"shared_memory", kSharedBegin}};
  std::unordered_map<string, std::vector<Slot>> registers_;
  std::unordered_map<string, uint32_t> labels_;
  std::map<std::pair<uint64_t, uint32_t>, Slot> constants_;
  std::vector<std::pair<size_t, string>> branches_;
};

}  // namespace

Kernel decoded(const string& text) { return Decoder(text).kernel(); }

}  // namespace ptx
