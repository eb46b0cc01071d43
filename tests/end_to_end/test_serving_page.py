"""The page of serve.py in a real browser."""

import pytest

from tests.end_to_end.browser import PROGRAM, chromium
from tests.end_to_end.serving import CONTEXT, make_model, serving, wait_for

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium")

SHOWN = "document.querySelector('#shown .turn:last-child')"
LENGTH = f"{SHOWN}.textContent.length"
STATUS = "document.querySelector('#status').textContent"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    make_model(folder)
    with serving(folder, "chat_template=chat.jinja", "serve_model_name=small", DEEPY_API_KEYS="the-key") as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def page(server, browser):
    browser.show_as(1280, 900, "light")
    browser.open(server.url)
    return browser


def fill(page, selector: str, text: str) -> None:
    page.value(f"(e => {{ e.focus(); e.select(); }})(document.querySelector({selector!r}))")
    page.type(text)


def test_a_person_types_a_prompt_sees_the_text_grow_and_stops_it(page, server):
    page.wait_for(f"{STATUS}.includes('a key is missing')")
    fill(page, "#key", "the-key")
    page.press("Tab")
    page.wait_for("document.title === 'small'")
    fill(page, "#tokens", str(CONTEXT - 60))
    fill(page, "#temperature", "0")  # this model then repeats itself, and does not end soon
    fill(page, "#stop_string", "never in it")
    fill(page, "#input", "The quick brown fox")
    page.press("Enter", control=True)
    page.wait_for(f"{SHOWN} && {LENGTH} > 60")
    before = page.value(LENGTH)
    page.wait_for(f"{LENGTH} > {before}")
    assert page.value(f"{SHOWN}.textContent").startswith("The quick brown fox")
    page.click("#stop")
    page.wait_for(f"{STATUS} === 'Stopped'")
    length = page.value(LENGTH)
    wait_for(
        lambda: server.figure("deepy_slots_in_use", headers={"Authorization": "Bearer the-key"}) == 0, server.process
    )
    assert page.value(LENGTH) == length
    assert page.value("document.activeElement.id") == "input"


def test_a_person_chats_with_the_keyboard_alone(page):
    fill(page, "#key", "the-key")
    page.press("Tab")
    page.wait_for("document.title === 'small'")
    fill(page, "#tokens", "12")
    page.value("document.querySelector('#mode-prompt').focus()")
    page.press("ArrowRight")
    page.wait_for("document.querySelector('#send').textContent === 'Send'")
    for number in (1, 2):
        fill(page, "#input", f"Question {number}")
        page.press("Enter", control=True)
        page.wait_for(f"document.querySelectorAll('.turn').length === {2 * number} && {STATUS}.includes('a second')")
    assert page.value("messages.map(message => message.role).join()") == "user,assistant,user,assistant"
    assert page.value("messages[2].content") == "Question 2"


@pytest.mark.parametrize("width", [360, pytest.param(1280, marks=pytest.mark.long)])
def test_nothing_is_wider_than_the_window(page, width):
    page.show_as(width, 780, "light")
    assert page.value("document.documentElement.scrollWidth <= innerWidth")
    assert page.value("performance.getEntriesByType('resource').every(one => one.name.startsWith(location.origin))")
