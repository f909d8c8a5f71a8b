//! What kind of reply a client wants: the `Accept` header, read for the few types there are here.

use axum::http::{HeaderMap, header};

use super::wire::OutputFormat;

/// The kind of reply to a request for images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// JSON, or server-sent events when the body asks for them.
    Json,
    /// The image itself; `None` is any image type.
    Image(Option<OutputFormat>),
}

/// The first acceptable type that there is here, by quality, then by order. Without any, JSON.
pub(super) fn wanted(headers: &HeaderMap) -> Wanted {
    let values = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let mut ranges: Vec<(&str, f32)> =
        values.flat_map(|value| value.split(',')).map(media_range).collect();
    ranges.sort_by(|(_, left), (_, right)| right.total_cmp(left));
    ranges
        .into_iter()
        .filter(|(_, quality)| *quality > 0.0)
        .find_map(|(range, _)| match range.to_ascii_lowercase().as_str() {
            "image/png" => Some(Wanted::Image(Some(OutputFormat::Png))),
            "image/jpeg" => Some(Wanted::Image(Some(OutputFormat::Jpeg))),
            "image/webp" => Some(Wanted::Image(Some(OutputFormat::Webp))),
            "image/*" => Some(Wanted::Image(None)),
            "application/json" | "application/*" | "text/event-stream" | "*/*" => {
                Some(Wanted::Json)
            }
            _ => None,
        })
        .unwrap_or(Wanted::Json)
}

/// A media range and its quality, 1 unless it says otherwise.
fn media_range(text: &str) -> (&str, f32) {
    let mut parts = text.split(';').map(str::trim);
    let range = parts.next().unwrap_or_default();
    let quality = parts
        .filter_map(|parameter| parameter.split_once('='))
        .find(|(name, _)| name.trim().eq_ignore_ascii_case("q"))
        .and_then(|(_, value)| value.trim().parse().ok())
        .unwrap_or(1.0);
    (range, quality)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn wanted_by(accept: &str) -> Wanted {
        wanted(&HeaderMap::from_iter([(header::ACCEPT, accept.parse().unwrap())]))
    }

    #[test]
    fn the_first_acceptable_type_wins() {
        let png = Wanted::Image(Some(OutputFormat::Png));
        let webp = Wanted::Image(Some(OutputFormat::Webp));
        let cases = [
            ("image/png", png),
            ("IMAGE/PNG", png),
            ("*/*", Wanted::Json),
            ("", Wanted::Json),
            ("application/json, image/png", Wanted::Json),
            ("image/png, application/json", png),
            ("application/json;q=0.5, image/png;q=0.9", png),
            ("image/png;q=0, */*", Wanted::Json),
            ("image/avif, image/webp, */*;q=0.8", webp),
            ("image/*", Wanted::Image(None)),
            ("text/html, image/webp;q=0.1", webp),
            ("text/html", Wanted::Json),
            ("image/png; level=1; q=0.2, image/webp; q=0.3", webp),
        ];
        for (accept, expected) in cases {
            assert_eq!(wanted_by(accept), expected, "{accept}");
        }
        assert_eq!(wanted(&HeaderMap::new()), Wanted::Json);
    }
}
