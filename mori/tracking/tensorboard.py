"""TensorBoard events in the run's folder."""

import html
import re
import textwrap
import time
from collections.abc import Iterable, Sequence

from mori.tracking.loggers import Logger, spans

_EVENTS_NAME = re.compile(r"events\.out\.tfevents\.(\d{10})\b")


class TensorBoard(Logger):
    """TensorBoard events in the run's folder."""

    name, in_background = "TensorBoard", False
    _records = None
    _started = False

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write `values` at `step` and flush."""
        from torch.utils.tensorboard.summary import scalar

        self._write(step, [scalar(tag, value) for tag, value in values.items()])

    def text(self, step: int, tag: str, text: str, marked: Sequence[tuple[int, int]] = ()) -> None:
        """Show `text` word for word, with long lines folded and the `marked` spans in bold."""
        from torch.utils.tensorboard.summary import text as text_summary

        self._write(step, [text_summary(tag, preformatted(text, marked))])

    def close(self) -> None:
        """Close the events file."""
        if self._records:
            self._records.close()

    def _write(self, step: int, summaries: list) -> None:
        """Append an event for each summary. After an error, the next write starts a new file: this one may end in a part."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        events = [Event(step=step, summary=summary) for summary in summaries]
        if not self._records:
            first = [Event(file_version="brain.Event:2")]
            if not self._started:  # TensorBoard forgets the events of this step and later ones that it has read before
                first.append(Event(step=self.first_lost_step, session_log=SessionLog(status=SessionLog.START)))
            events = first + events
            self._records = RecordWriter((self.run_dir / self._new_name()).open("xb"))
        try:
            for event in events:
                event.wall_time = time.time()
                self._records.write(event.SerializeToString())
            self._records.flush()
            self._started = True
        except OSError:
            self._records = None
            raise

    def _new_name(self) -> str:
        """The name of a file that TensorBoard reads after those present: it sorts them by name, and a clock may go back."""
        times = [int(name[1]) for path in self.run_dir.glob("events*") if (name := _EVENTS_NAME.match(path.name))]
        return f"events.out.tfevents.{max([int(time.time()), *(latest + 1 for latest in times)]):010d}.mori"


_BOLD = {
    "\ufdd0": "<strong>",
    "\ufdd1": "</strong>",
}  # noncharacters of Unicode, which stand for the tags until the text is escaped


def preformatted(text: str, marked: Iterable[tuple[int, int]] = ()) -> str:
    """`text` as HTML that shows it word for word: escaped, folded at 110 columns, the `marked` spans in bold."""
    begin, end = _BOLD
    text = text.translate(dict.fromkeys(map(ord, _BOLD), "\ufffd"))
    text = "".join(f"{begin}{part}{end}" if is_marked else part for part, is_marked in spans(text, marked))
    folded = "\n".join(part for line in text.splitlines() for part in textwrap.wrap(line, 110) or [""])
    return f"<pre>{html.escape(folded, quote=False).translate(str.maketrans(_BOLD))}</pre>"
