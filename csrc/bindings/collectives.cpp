// reduce_tables and publish: the two collectives of the sequence ratio, called on torch's ProcessGroup without the GIL.
// Both return at once with a handle whose wait() gives the result, on every rank the same bits.
//
// A Python module, unlike the kernels' library: a ProcessGroup comes from Python. Errors and what a rank's death means
// are in gspo_megatron/ops/collectives.py, which also has the same two through torch.distributed.
#include <ATen/ops/empty.h>
#include <ATen/ops/maximum.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <optional>
#include <utility>

namespace py = pybind11;

namespace gspo {
namespace {

using Group = c10::intrusive_ptr<c10d::ProcessGroup>;
using Work = c10::intrusive_ptr<c10d::Work>;

// Tables of all ranks on their way. The first wait() adds them.
class PendingTable {
 public:
  PendingTable(const Group& group, const at::Tensor& table, std::optional<int64_t> maximum)
      : ranks_(group->getSize()), maximum_(maximum), table_(table.contiguous()) {
    TORCH_CHECK_VALUE(table.dim() == 2 && table.scalar_type() == at::kDouble, "table is ", table.scalar_type(), " ",
                      table.sizes(), "; expected fp64 [S, k]");
    TORCH_CHECK_VALUE(!maximum || (*maximum >= 0 && *maximum < table.size(1)), "maximum = ", maximum.value_or(-1),
                      " is no column of a table with ", table.size(1));
    gathered_ = at::empty({ranks_ * table.size(0), table.size(1)}, table.options());
    work_ = group->all_gather_single(gathered_, table_);
  }

  at::Tensor wait() {
    if (work_) {
      work_->wait();
      work_.reset();
      total_ = combined();
    }
    return total_;
  }

 private:
  // In rank order, whatever arrived first. at::maximum keeps a not-a-number of either side.
  at::Tensor combined() const {
    const at::Tensor by_rank = gathered_.view({ranks_, table_.size(0), table_.size(1)});
    at::Tensor total = by_rank.select(0, 0).clone(), largest;
    if (maximum_) largest = total.select(1, *maximum_).clone();
    for (int64_t rank = 1; rank < ranks_; ++rank) {
      total.add_(by_rank.select(0, rank));
      if (maximum_) largest = at::maximum(largest, by_rank.select(0, rank).select(1, *maximum_));
    }
    if (maximum_) total.select(1, *maximum_).copy_(largest);
    return total;
  }

  int64_t ranks_;
  std::optional<int64_t> maximum_;
  at::Tensor table_, gathered_, total_;
  Work work_;
};

// The last stage's message on its way.
class PendingMessage {
 public:
  PendingMessage(const Group& group, at::Tensor message, int64_t root) : message_(std::move(message)) {
    TORCH_CHECK_VALUE(message_.is_contiguous(), "message must be contiguous");
    TORCH_CHECK_VALUE(root >= 0 && root < group->getSize(), "root = ", root, " is no rank of a group of ",
                      group->getSize());
    std::vector<at::Tensor> tensors = {message_};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    work_ = group->broadcast(tensors, options);
  }

  at::Tensor wait() {
    if (work_) {
      work_->wait();
      work_.reset();
    }
    return message_;
  }

 private:
  at::Tensor message_;
  Work work_;
};

}  // namespace
}  // namespace gspo

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using gspo::Group;
  using gspo::PendingMessage;
  using gspo::PendingTable;
  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<PendingTable>(module, "PendingTable").def("wait", &PendingTable::wait, Release());
  py::class_<PendingMessage>(module, "PendingMessage").def("wait", &PendingMessage::wait, Release());
  module.def(
      "reduce_tables",
      [](const Group& group, const at::Tensor& table, std::optional<int64_t> maximum) {
        return std::make_unique<PendingTable>(group, table, maximum);
      },
      py::arg("group"), py::arg("table"), py::arg("maximum"), Release());
  module.def(
      "publish",
      [](const Group& group, const at::Tensor& message, int64_t root) {
        return std::make_unique<PendingMessage>(group, message, root);
      },
      py::arg("group"), py::arg("message"), py::arg("root"), Release());
}
