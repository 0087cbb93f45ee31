// The one translator from Python for both extensions: bytes to the records of core/arguments.h, and
// the names of their fields, by which Python sees that it writes the same records.
#pragma once

#include <pybind11/pybind11.h>

#include <string.h>

#include "core/arguments.h"

namespace fastsample {

// The fields of every record, as tuples of strings.
inline void add_fields(pybind11::module_& m) {
  for (const auto& [record, fields] : kRecords) {
    const pybind11::object words = pybind11::str(fields).attr("replace")(",", "");
    m.attr(record) = pybind11::tuple(words.attr("split")());
  }
}

}  // namespace fastsample

namespace pybind11::detail {

// Anything but bytes of exactly this size is a TypeError.
template <class Record>
struct record_caster {
  PYBIND11_TYPE_CASTER(Record, const_name("bytes"));

  bool load(handle from, bool) {
    if (!PyBytes_Check(from.ptr()) || PyBytes_GET_SIZE(from.ptr()) != sizeof value) return false;
    memcpy(&value, PyBytes_AS_STRING(from.ptr()), sizeof value);
    return true;
  }
};

template <>
struct type_caster<fastsample::RowArguments> : record_caster<fastsample::RowArguments> {};
template <>
struct type_caster<fastsample::ReportArguments> : record_caster<fastsample::ReportArguments> {};
template <>
struct type_caster<fastsample::DraftArguments> : record_caster<fastsample::DraftArguments> {};
template <>
struct type_caster<fastsample::LogitsArguments> : record_caster<fastsample::LogitsArguments> {};
template <>
struct type_caster<fastsample::PartArguments> : record_caster<fastsample::PartArguments> {};
template <>
struct type_caster<fastsample::SplitArguments> : record_caster<fastsample::SplitArguments> {};
template <>
struct type_caster<fastsample::CallArguments> : record_caster<fastsample::CallArguments> {};

}  // namespace pybind11::detail
