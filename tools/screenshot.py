"""python -m tools.screenshot RUN FOLDER: the pictures of README, from a finished run (make record).

report.png is the top of its report.html. play.png is the page of aymen-gpt play: a text that the model wrote, one
token's alternatives, and the same beginning continued by every checkpoint that the run kept.
"""

import sys
import threading
from pathlib import Path

import torch
import uvicorn
from playwright.sync_api import expect, sync_playwright

from aymen_gpt.commands import play
from aymen_gpt.play import models, server

CLIP = {"x": 0, "y": 0, "width": 1280, "height": 1180}
PROMPT = "Return a new array of the given shape"


def main(run: str, folder: str) -> None:
    with sync_playwright() as playwright, play.listen("127.0.0.1", 0) as listening:
        served = models.Models(run, torch.device("cpu"))
        app = server.app(served, hosts=["127.0.0.1"], curves=lambda: play.curves(served.run))
        running = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1560})
        page.goto((Path(run) / "report.html").resolve().as_uri())
        page.screenshot(path=Path(folder) / "report.png")
        page.goto(f"http://127.0.0.1:{listening.getsockname()[1]}/")
        page.fill("#prompt", PROMPT)
        page.locator("#max_tokens").fill("60")
        page.click("#go")
        page.click("#all")
        expect(page.locator("article[data-done]")).to_have_count(len(served.steps()), timeout=120_000)
        page.locator("#text span:not(.given)").nth(3).hover()
        page.screenshot(
            path=Path(folder) / "play.png",
            clip=CLIP,  # type: ignore[arg-type]
            full_page=True,
        )
        browser.close()
        running.should_exit = running.force_exit = True
        thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
