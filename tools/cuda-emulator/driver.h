// What the emulated libraries ask of the emulated driver.
#pragma once
#include <functional>

// Does it when the stream comes to it: at once, or whenever the graph that is being captured is launched.
void emulated_submit(void *stream, std::function<void()> operation);

void emulated_count(const char *name);
