"""The completion scripts of bash and zsh; both ask `ssmtrain completion` what may follow."""

from __future__ import annotations

BASH = """\
# eval "$(ssmtrain completion bash)"
_ssmtrain() {
  local line="${COMP_LINE:0:COMP_POINT}" word breaks cut="" i
  word="${line##*[[:space:]]}"
  local IFS=$'\\n'
  COMPREPLY=($(ssmtrain completion query "$line" 2>/dev/null))
  # bash cuts words at these and replaces only the part behind the last, an @ with it
  breaks="${COMP_WORDBREAKS//[^=:@]/}"
  [[ -n "$breaks" ]] && cut="${word%"${word##*[$breaks]}"}"
  cut="${cut%@}"
  for i in "${!COMPREPLY[@]}"; do COMPREPLY[i]="${COMPREPLY[i]#"$cut"}"; done
  [[ ${#COMPREPLY[@]} -eq 1 && "${COMPREPLY[0]}" == *[=.] ]] && compopt -o nospace 2>/dev/null
  return 0
}
complete -o default -F _ssmtrain ssmtrain
"""

ZSH = """\
# eval "$(ssmtrain completion zsh)"
_ssmtrain() {
  local -a open open_said closed closed_said
  local word about
  while IFS=$'\\t' read -r word about; do
    [[ -n "$word" ]] || continue
    about="$word${about:+  -- $about}"
    if [[ "$word" == *[=.] ]]; then
      open+=("$word"); open_said+=("$about")
    else
      closed+=("$word"); closed_said+=("$about")
    fi
  done < <(ssmtrain completion describe "$LBUFFER" 2>/dev/null)
  (( $#open )) && compadd -S '' -Q -l -d open_said -a open
  (( $#closed )) && compadd -Q -l -d closed_said -a closed
  (( $#open + $#closed )) || _files
}
compdef _ssmtrain ssmtrain
"""
