"""Chat in the terminal: each line is a question, and its answer is printed as it grows."""

import contextlib
import signal
import sys
from collections.abc import Iterator

from utils.chat.conversations import Conversation
from utils.chat.sessions import ChatReply, ChatService
from utils.console import UserError, harmless, say
from utils.inference.engine import Engine
from utils.inference.sampling_params import SamplingParams

HELP = (
    "/model NAME: change the model; /clear: new dialogue; Ctrl-C: stop an answer; "
    "/exit or Ctrl-D: leave, typed during an answer at its end"
)


def talk(engine: Engine, settings: SamplingParams) -> None:
    """Read questions and print answers until the input ends."""
    with contextlib.suppress(ImportError):  # line editing, and history with the arrow keys
        import readline  # noqa: F401
    service = ChatService(engine, settings.max_new_tokens)
    names = [one.name for one in engine.answerers]
    name, conversation = names[-1], Conversation()
    say(f"{engine.base_model}, {engine.placement}; {', '.join(names)}\n{HELP}")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as often as it is pressed
    try:
        while (line := asked(name)) is not None:
            command, _, rest = line.strip().partition(" ")
            if command == "/exit":
                return
            if command == "/clear":
                conversation = Conversation()
            elif command == "/model" and rest.strip() in names:
                name = rest.strip()
            elif command.startswith("/"):
                say(f"{HELP}; names are {', '.join(names)}")
            elif line.strip():
                conversation = conversation.asked(line)
                with keys_kept():
                    answer = written(service.reply(name, conversation.record(), settings))
                conversation = conversation.answered(answer)
    finally:
        service.scheduler.close()


def asked(name: str) -> str | None:
    """The next line; "" after Ctrl-C; None at the end of the input."""
    try:
        return input(f"{name}> ")
    except KeyboardInterrupt:  # perhaps meant for the answer that has just ended
        print()
        return ""
    except EOFError:
        print()
        return None


@contextlib.contextmanager
def keys_kept() -> Iterator[None]:
    """Keep what is typed in the block for the next line, without echo. A terminal that collects lines would lose Ctrl-D,
    which readline reads only after the block."""
    if "readline" not in sys.modules or not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin, termios.TCSADRAIN)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def written(replies: Iterator[ChatReply]) -> str:
    """Print an answer as it grows; returns it at its end, or what there is when Ctrl-C is pressed."""
    text = ""
    try:
        for reply in replies:
            new = reply.text[len(text) :] if reply.text.startswith(text) else ""
            sys.stdout.write(harmless(new))
            sys.stdout.flush()
            text += new
            if reply.finish == "length":
                sys.stdout.write(" … (cut: --max_new_tokens)")
    except UserError as error:
        say(f"no answer: {error}")
    except KeyboardInterrupt:
        sys.stdout.write(" … (stopped)")
    print()
    return text
