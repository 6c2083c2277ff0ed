// How the channels of a grouped convolution fall into vectors.
#pragma once

#include <algorithm>

#include "conv_shape.h"

namespace fastres::cpu {

// A panel is one vector of outputs, of several narrow groups side by side or of a wide one, or two
// vectors of a group that is wider yet. Inputs and outputs are those of one group, inputs in what a
// lane holds. Packed filters: [panel][step][R][S][lane], zeros in lanes without an output.
//
// Of a wide group every step multiplies one input, in all lanes. Of narrow groups each lane always
// has the same input of its group, and it is the sums that move one lane down between the steps,
// the first of a group to its last: after all steps the sum of every output met every input.
struct GroupedForm {
  int64_t groups, inputs, outputs;
  int64_t lanes;  // of a vector

  GroupedForm(int64_t groups, int64_t inputs, int64_t outputs, int64_t lanes)
      : groups(groups), inputs(inputs), outputs(outputs), lanes(lanes) {}

  GroupedForm(const ConvShape& shape, int64_t lanes, int64_t channels_a_lane = 1)
      : GroupedForm(shape.groups, shape.c / shape.groups / channels_a_lane, shape.k / shape.groups,
                    lanes) {}

  bool is_narrow() const { return 2 * outputs <= lanes && outputs % inputs == 0; }
  int64_t side_by_side() const { return is_narrow() ? lanes / outputs : 1; }

  int64_t vectors() const { return outputs > lanes ? 2 : 1; }
  int64_t panel() const { return vectors() * lanes; }

  int64_t panels_of_group() const { return ceil_div(outputs, panel()); }
  int64_t panels() const { return ceil_div(groups, side_by_side()) * panels_of_group(); }

  int64_t packed_panel(int64_t taps) const { return taps * inputs * panel(); }
  // From one pixel of the packed input to the next.
  int64_t pixel() const { return is_narrow() ? lanes : inputs; }

  Range groups_of(int64_t index) const {
    const int64_t first = index / panels_of_group() * side_by_side();
    return {first, std::min(first + side_by_side(), groups)};
  }

  Range outputs_of(int64_t index) const {
    const auto in = groups_of(index);
    const int64_t first = in.begin * outputs + index % panels_of_group() * panel();
    return {first, std::min(first + panel(), in.end * outputs)};
  }

  // What an output of narrow groups has in its lane.
  int64_t input_of(int64_t output) const { return output % inputs; }

  // The lane of a group whose sum moves on to this one.
  int64_t lane_above(int64_t lane) const { return (lane + 1) % outputs; }

  // Which output and input of a group meet in this lane of it.
  struct Product {
    int64_t output, input;
  };
  Product product(int64_t lane, int64_t step) const {
    if (!is_narrow()) return {lane, step};
    const int64_t moves = inputs - 1 - step;  // to come
    return {(lane + outputs - moves) % outputs, input_of(lane)};
  }
};

// The part of the padded input that some rows of the output lie over, in pixels.
struct PaddedPart {
  int64_t rows, columns;

  PaddedPart(const ConvShape& shape, int64_t output_rows)
      : rows((output_rows - 1) * shape.stride[0] + (shape.r - 1) * shape.dilation[0] + 1),
        columns((shape.q - 1) * shape.stride[1] + (shape.s - 1) * shape.dilation[1] + 1) {}
};

}  // namespace fastres::cpu
